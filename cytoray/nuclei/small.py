"""The small detector: a convolutional net of some hundred thousand weights that come along.

Whatever the magnification, the image is brought to 0.75 um per pixel and to optical density
against its own glass. The net says for every 1.5 um how surely a nucleus has its centre there, and
how large it is (after Zhou et al. 2019, Objects as Points). `train_small` trains it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from cytoray.errors import InputError, raise_problems
from cytoray.nuclei.blobs import suppress
from cytoray.nuclei.stain import glass_level

SHIPPED_WEIGHTS = Path(__file__).with_name("weights") / "small.safetensors"
WORK_UM = 0.75  # um per pixel the net sees
STRIDE = 2  # pixels per cell of its output
MULTIPLE_PX = 8  # sides of its input
REFERENCE_UM = 4.0  # a radius is given as the logarithm of its ratio to this
_WINDOW_PX, _HALO_PX = 1024, 72  # of one forward pass; the halo covers the receptive field
_OFFSET = 4.0  # grey levels; keeps the density of near-black pixels finite

# density (h, w, 3) to centre logit and radius_um, each (ceil(h / 2), ceil(w / 2))
Forward = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class SmallConfig:
    """Parameters of the small detector.

    Attributes:
        weights: a file written by `train_small`; empty for the weights of the package.
        min_score: smallest score accepted, 0 to 1; smaller finds more and errs more often.
        overlap: two nuclei nearer than this share of the larger radius are one.
    """

    weights: str | os.PathLike[str] = ""
    min_score: float = 0.4
    overlap: float = 0.9

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.min_score < 1:
            problems.append(f"min_score must lie between 0 and 1, not {self.min_score}")
        if not self.overlap > 0:
            problems.append(f"overlap must be above 0, not {self.overlap}")
        raise_problems("the small nuclei detector cannot run:", problems)


def normalise(pixels: np.ndarray, glass: tuple[float, ...] | None = None) -> np.ndarray:
    """Optical density against the glass, so that lamp, exposure and white balance drop out.

    Args:
        pixels: uint8 (h, w, 3).
        glass: grey level of empty glass per channel; measured when not given.

    Returns:
        float32 (h, w, 3): ln((glass + 4) / (level + 4)).
    """
    planes = cv2.split(pixels)
    levels = np.log(np.arange(256, dtype=np.float32) + np.float32(_OFFSET))
    if glass is None:
        glass = tuple(float(glass_level(plane)) for plane in planes)
    tables = [np.float32(np.log(level + _OFFSET)) - levels for level in glass]
    return cv2.merge([cv2.LUT(plane, table) for plane, table in zip(planes, tables, strict=True)])


def to_work_scale(pixels: np.ndarray, mpp: float) -> tuple[np.ndarray, float, float]:
    """Resample to `WORK_UM` per pixel.

    Args:
        pixels: uint8 (h, w, 3), not empty.
        mpp: um per pixel.

    Returns:
        uint8 (h', w', 3), and source pixels per working pixel along x and y.
    """
    height, width = pixels.shape[:2]
    size = max(1, round(width * mpp / WORK_UM)), max(1, round(height * mpp / WORK_UM))
    if size == (width, height):
        return np.ascontiguousarray(pixels), 1.0, 1.0
    how = cv2.INTER_AREA if mpp < WORK_UM else cv2.INTER_LINEAR
    work = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=how)
    return np.asarray(work, np.uint8), width / size[0], height / size[1]


def run_tiled(forward: Forward, density: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`forward` over an image of any size in bounded memory, as if it were one pass.

    Args:
        forward: the net.
        density: float32 (h, w, 3).

    Returns:
        centre logit and radius_um, each float32 (ceil(h / 2), ceil(w / 2)).
    """
    height, width = density.shape[:2]
    if max(height, width) <= _WINDOW_PX + 2 * _HALO_PX:
        return forward(density)
    shape = (-(-height // STRIDE), -(-width // STRIDE))
    logit, radius_um = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for top in range(0, height, _WINDOW_PX):
        for left in range(0, width, _WINDOW_PX):
            y, x = max(0, top - _HALO_PX), max(0, left - _HALO_PX)
            bottom, right = min(height, top + _WINDOW_PX), min(width, left + _WINDOW_PX)
            parts = forward(density[y : bottom + _HALO_PX, x : right + _HALO_PX])
            rows = slice(top // STRIDE, -(-bottom // STRIDE))
            columns = slice(left // STRIDE, -(-right // STRIDE))
            inner = (
                slice(rows.start - y // STRIDE, rows.stop - y // STRIDE),
                slice(columns.start - x // STRIDE, columns.stop - x // STRIDE),
            )
            logit[rows, columns], radius_um[rows, columns] = parts[0][inner], parts[1][inner]
    return logit, radius_um


def find_centres(
    logit: np.ndarray, radius_um: np.ndarray, min_score: float, overlap: float
) -> np.ndarray:
    """Nuclei from the net's output: subpixel 3x3 maxima, then suppression by distance in um.

    Args:
        logit: float32 (h, w), of a centre in each cell of `STRIDE` working pixels.
        radius_um: float32 (h, w).
        min_score: smallest probability of a centre.
        overlap: two nuclei nearer than this share of the larger radius are one.

    Returns:
        float32 (N, 4), best first: x and y in working pixels, radius_um, score.
    """
    top = cv2.dilate(logit, np.ones((3, 3), np.uint8))
    least = float(np.log(min_score / (1 - min_score)))
    row, column = np.nonzero((logit >= top) & (logit >= least))
    peak, radius = logit[row, column], radius_um[row, column]
    padded = cv2.copyMakeBorder(logit, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    shift_x = _vertex(padded[row + 1, column], peak, padded[row + 1, column + 2])
    shift_y = _vertex(padded[row, column + 1], peak, padded[row + 2, column + 1])
    middle = (STRIDE - 1) / 2
    x_px = (column + shift_x) * STRIDE + middle
    y_px = (row + shift_y) * STRIDE + middle
    score = 1 / (1 + np.exp(-peak))
    xy_um = np.column_stack([x_px, y_px]) * WORK_UM
    kept = suppress(xy_um, radius, score, overlap)
    return np.column_stack([x_px, y_px, radius, score])[kept].astype(np.float32)


def _vertex(low: np.ndarray, mid: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where the parabola through three neighbours is highest, -0.5 to 0.5."""
    curve = np.maximum(2 * mid - low - high, 1e-6)
    return np.clip((high - low) / (2 * curve), -0.5, 0.5)


class SmallDetector:
    """The small net as a detector: `detect(pixels, mpp)`. On the CPU; torch's threads are its own.

    Args:
        config: parameters.

    Raises:
        InputError: the weights are missing or no weights of this net.
    """

    name = "small"

    def __init__(self, config: SmallConfig | None = None) -> None:
        import torch

        from cytoray.nuclei.small_net import forward_density, load_net

        self.config = config or SmallConfig()
        net = load_net(self.config.weights).fold()

        def forward(density: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logit, radius_um = forward_density(net, torch.from_numpy(density))
            return logit.numpy(), radius_um.numpy()

        self.forward: Forward = forward

    def __call__(self, pixels: np.ndarray, mpp: float) -> np.ndarray:
        """Nuclei of one image.

        Args:
            pixels: uint8 (h, w, 3), RGB.
            mpp: um per pixel of `pixels`.

        Returns:
            float32 (N, 4), best first: x_px, y_px (0, 0 is the centre of the first pixel),
            radius_um, score (`min_score` to 1).

        Raises:
            InputError: `pixels` is not uint8 (h, w, 3) or `mpp` is not positive.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise InputError(f"pixels must be uint8 (h, w, 3), not {pixels.dtype} {pixels.shape}")
        if not mpp > 0:
            raise InputError(f"mpp must be above 0 um per pixel, not {mpp}")
        if pixels.size == 0:
            return np.zeros((0, 4), np.float32)
        height, width = pixels.shape[:2]
        work, scale_x, scale_y = to_work_scale(pixels, mpp)
        logit, radius_um = run_tiled(self.forward, normalise(work))
        found = find_centres(logit, radius_um, self.config.min_score, self.config.overlap)
        found[:, 0] = np.clip((found[:, 0] + 0.5) * scale_x - 0.5, 0, width - 1)
        found[:, 1] = np.clip((found[:, 1] + 0.5) * scale_y - 0.5, 0, height - 1)
        return found
