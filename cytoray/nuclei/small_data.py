"""What the `small` detector is trained on: painted scenes, generated slides, one's own images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cytoray.errors import InputError
from cytoray.nuclei.small import REFERENCE_UM, STRIDE, WORK_UM, normalise
from cytoray.nuclei.small_augment import augment
from cytoray.nuclei.small_scenes import paint_scene
from cytoray.nuclei.stain import glass_level
from cytoray.synthetic import SynthConfig, make_slide
from cytoray.synthetic.textures import Float

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
_MIN_AREA_PX = 12  # smaller parts of a mask are specks of its compression
_RADIUS_HEAT = 0.5  # the radius is learned where the centre's bell is at least this high


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image with its true nuclei.

    Attributes:
        name: for people.
        pixels: uint8 (h, w, 3).
        mpp: um per pixel.
        nuclei: float32 (N, 3), x_px, y_px, radius_px.
    """

    name: str
    pixels: NDArray[np.uint8]
    mpp: float
    nuclei: Float


def generated_images(count: int, seed: int, size_px: int = 1024) -> list[LabelledImage]:
    """Slides of the project's generator, brought to 0.5 um per pixel."""
    config = SynthConfig(
        num_slides=count, size_px=size_px, held_out=0, cells_per_mm2=350.0, seed=seed
    )
    images = []
    for index in range(count):
        slide = make_slide(config, index)
        half = cv2.resize(slide.pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        x, y, radius_um = (
            slide.nuclei[name].to_numpy() for name in ("x_level0", "y_level0", "radius_um")
        )
        mpp = 2 * config.mpp
        nuclei = np.column_stack([(x + 0.5) / 2 - 0.5, (y + 0.5) / 2 - 0.5, radius_um / mpp])
        images.append(
            LabelledImage(
                name=slide.plan.slide_id,
                pixels=np.asarray(half, np.uint8),
                mpp=mpp,
                nuclei=nuclei.astype(np.float32),
            )
        )
    return images


def painted_images(count: int, seed: int, side_px: int = 256) -> list[LabelledImage]:
    """Painted scenes, augmented as in training."""
    images = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        pixels, nuclei = augment(rng, *paint_scene(rng, side_px))
        images.append(
            LabelledImage(name=f"scene_{index}", pixels=pixels, mpp=WORK_UM, nuclei=nuclei)
        )
    return images


def read_folder(images: Path, masks: Path, mpp: float) -> list[LabelledImage]:
    """A user's images and masks of the same stem; a mask is bright (above 127) in nuclei.

    Raises:
        InputError: a folder is missing or empty, or images have no mask or cannot be read.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder")
    by_stem = {path.stem: path for path in masks.iterdir() if path.suffix.lower() in SUFFIXES}
    found = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    problems = [f"{path.name} has no mask in {masks}" for path in found if path.stem not in by_stem]
    labelled = []
    for path in found:
        if path.stem not in by_stem:
            continue
        pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
        mask = cv2.imread(str(by_stem[path.stem]), cv2.IMREAD_GRAYSCALE)
        if pixels is None or mask is None:
            problems.append(f"{path.name} or its mask cannot be read as an image")
        elif pixels.shape[:2] != mask.shape:
            problems.append(f"{path.name} and its mask differ in size")
        else:
            rgb = np.ascontiguousarray(pixels[..., ::-1]).astype(np.uint8)
            nuclei = mask_nuclei(np.asarray(mask, np.uint8))
            labelled.append(LabelledImage(name=path.stem, pixels=rgb, mpp=mpp, nuclei=nuclei))
    if problems or not found:
        raise InputError(f"cannot train on {images}", problems or ["there is no image"])
    return labelled


def mask_nuclei(mask: NDArray[np.uint8]) -> Float:
    """Centroid and radius of each bright component: float32 (N, 3), x_px, y_px, radius_px."""
    _, _, stats, centres = cv2.connectedComponentsWithStats((mask > 127).astype(np.uint8))
    area = stats[1:, cv2.CC_STAT_AREA]
    nuclei = np.column_stack([centres[1:], np.sqrt(area / np.pi)])
    return nuclei[area >= _MIN_AREA_PX].astype(np.float32)


def crop_at_work_scale(
    rng: np.random.Generator, image: LabelledImage, side_px: int
) -> tuple[NDArray[np.uint8], Float]:
    """A random square of an image, resampled to about the working scale (0.7 to 1.4 times).

    Returns:
        uint8 (side, side, 3), glass-coloured where the image ends, and float32 (N, 3), x_px, y_px,
        radius_px of the nuclei in it.
    """
    zoom = float(np.exp(rng.uniform(np.log(0.7), np.log(1.4))))
    scale = image.mpp / WORK_UM * zoom  # crop pixels per image pixel
    height, width = image.pixels.shape[:2]
    source_px = max(2, round(side_px / scale))
    left = int(rng.integers(0, max(width - source_px, 0) + 1))
    top = int(rng.integers(0, max(height - source_px, 0) + 1))
    part = image.pixels[top : top + source_px, left : left + source_px]
    missing = (source_px - part.shape[0], source_px - part.shape[1])
    if any(missing):
        part = cv2.copyMakeBorder(part, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
    how = cv2.INTER_AREA if source_px > side_px else cv2.INTER_LINEAR
    pixels = cv2.resize(part, (side_px, side_px), interpolation=how)
    exact = side_px / source_px
    nuclei = image.nuclei * np.float32(exact)
    nuclei[:, 0] = (image.nuclei[:, 0] + 0.5 - left) * exact - 0.5
    nuclei[:, 1] = (image.nuclei[:, 1] + 0.5 - top) * exact - 0.5
    inside = ((nuclei[:, :2] > -0.5) & (nuclei[:, :2] < side_px - 0.5)).all(axis=1)
    return np.asarray(pixels, np.uint8), nuclei[inside]


def make_targets(nuclei: Float, side_px: int) -> tuple[Float, Float, NDArray[np.bool_]]:
    """What the net should answer for a square field.

    Args:
        nuclei: float32 (N, 3), x_px, y_px, radius_px.
        side_px: side of the field, a multiple of `STRIDE`.

    Returns:
        heat float32 (s, s), a bell around each centre; log radius over 4 um float32 (s, s), NaN
        away from nuclei; bool (s, s), the cells that hold a centre; s = side / stride.
    """
    cells = side_px // STRIDE
    centre = np.zeros((cells, cells), bool)
    if len(nuclei) == 0:
        return np.zeros(centre.shape, np.float32), np.full(centre.shape, np.nan, np.float32), centre
    x, y = (nuclei[:, axis] / STRIDE - (STRIDE - 1) / (2 * STRIDE) for axis in (0, 1))
    sigma = np.maximum(0.8, 0.3 * nuclei[:, 2] / STRIDE)
    axis = np.arange(cells, dtype=np.float32)
    along_x = np.exp(-(((axis - x[:, None]) / sigma[:, None]) ** 2) / 2)
    along_y = np.exp(-(((axis - y[:, None]) / sigma[:, None]) ** 2) / 2)
    bells = along_y[:, :, None] * along_x[:, None, :]
    row, column = (np.clip(np.rint(v).astype(int), 0, cells - 1) for v in (y, x))
    centre[row, column] = True
    heat = bells.max(axis=0)
    log_radii = np.log(nuclei[:, 2] * WORK_UM / REFERENCE_UM).astype(np.float32)
    log_radius = np.where(heat >= _RADIUS_HEAT, log_radii[bells.argmax(axis=0)], np.nan)
    return heat.astype(np.float32), log_radius.astype(np.float32), centre


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Training crops: density (B, side, side, 3), heat, log radius (NaN: not learned), centres."""

    density: Float
    heat: Float
    log_radius: Float
    centre: NDArray[np.bool_]


class CropSource:
    """Draws augmented training crops from painted scenes and pools of images.

    Painting a scene costs more than a training step gains from its novelty, so a scene is seen a
    few times, each time turned, stained and blurred otherwise.

    Args:
        pools: share of the crops and images to cut them from; what is left is painted.
        side_px: side of a crop.
        uses: how often a painted scene is seen, on average.
        kept: painted scenes held at a time.
    """

    def __init__(
        self,
        pools: Sequence[tuple[float, Sequence[LabelledImage]]],
        side_px: int,
        *,
        uses: float = 3.0,
        kept: int = 128,
    ) -> None:
        self.images = [images for _, images in pools]
        self.edges = np.cumsum([share for share, _ in pools])
        self.side_px, self.uses, self.kept = side_px, uses, kept
        self.scenes: list[tuple[NDArray[np.uint8], Float]] = []

    def batch(self, rng: np.random.Generator, size: int) -> Batch:
        """Draw a batch; the same draws in the same order give the same batches."""
        rows = []
        for _ in range(size):
            pixels, nuclei = augment(rng, *self._field(rng))
            rows.append((misjudged_density(rng, pixels), *make_targets(nuclei, self.side_px)))
        density, heat, log_radius, centre = (np.stack(part) for part in zip(*rows, strict=True))
        return Batch(density=density, heat=heat, log_radius=log_radius, centre=centre)

    def _field(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], Float]:
        pool = int(np.searchsorted(self.edges, rng.random(), side="right"))
        if pool < len(self.images):
            images = self.images[pool]
            return crop_at_work_scale(rng, images[int(rng.integers(len(images)))], self.side_px)
        if len(self.scenes) < self.kept:
            self.scenes.append(paint_scene(rng, self.side_px))
            return self.scenes[-1]
        place = int(rng.integers(self.kept))
        if rng.random() * self.uses < 1:
            self.scenes[place] = paint_scene(rng, self.side_px)
        return self.scenes[place]


def misjudged_density(rng: np.random.Generator, pixels: NDArray[np.uint8]) -> Float:
    """`normalise` with the glass taken a little too bright or too dark, as in a crowded chunk."""
    planes: Iterable[np.ndarray] = cv2.split(pixels)
    error = np.exp(rng.normal(0, 0.05) + rng.normal(0, 0.03, 3))
    glass = [glass_level(plane) * factor for plane, factor in zip(planes, error, strict=True)]
    return normalise(pixels, tuple(glass))
