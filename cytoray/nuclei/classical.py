"""The classical detector: stain density, blobs in scale space, evidence along rays. No weights.

Detection runs at `work_um` per pixel whatever the magnification of the image, so that the same
cell gives the same nucleus at 20x and at 40x, and a core does some hundred tiles a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cytoray.errors import InputError, raise_problems
from cytoray.nuclei.blobs import find_blobs, suppress
from cytoray.nuclei.rays import RayMeasures, measure_rays
from cytoray.nuclei.stain import black_border, fill_border, nuclear_density

_SMOOTH_UM = 0.4  # blur before rays are read, so that single pixels decide nothing
_DETAIL_UM = 1.0  # detail finer than this is texture, not nucleus
_MAX_DETAIL = 0.07  # density; larger detail is the edge of something


@dataclass(frozen=True, kw_only=True)
class ClassicalConfig:
    """Parameters of the classical detector; lengths in um, densities in log10 units.

    Attributes:
        min_radius_um: smallest nucleus looked for (a lobe of a neutrophil is about 2).
        max_radius_um: largest nucleus looked for.
        num_scales: scales between the two, spaced geometrically.
        work_um: um per pixel the search runs at; coarser images are searched as they are.
        min_strength: blob strength a candidate needs before it is measured, in density units.
        min_score: smallest score accepted, 0 to 1; see `score_candidates`.
        min_density: smallest mean density inside a nucleus; red blood cells stay below.
        reference_step: step in density that scores 0.5 in perfectly even surroundings.
        texture_window_um: side of the window in which the surroundings' texture is averaged.
        overlap: two nuclei nearer than this share of the larger radius are one.
        border_area_um2: black areas at least this large are borders, not cells.
    """

    min_radius_um: float = 2.3
    max_radius_um: float = 10.0
    num_scales: int = 6
    work_um: float = 0.75
    min_strength: float = 0.03
    min_score: float = 0.5
    min_density: float = 0.18
    reference_step: float = 0.045
    texture_window_um: float = 28.0
    overlap: float = 1.2
    border_area_um2: float = 1500.0

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.min_radius_um <= self.max_radius_um:
            problems.append("0 < min_radius_um <= max_radius_um is needed")
        if self.num_scales < 1:
            problems.append(f"num_scales must be at least 1, not {self.num_scales}")
        if not 0 < self.min_score < 1:
            problems.append(f"min_score must lie between 0 and 1, not {self.min_score}")
        positive = ("work_um", "min_strength", "min_density", "reference_step", "overlap")
        for name in (*positive, "texture_window_um", "border_area_um2"):
            if not getattr(self, name) > 0:
                problems.append(f"{name} must be above 0, not {getattr(self, name)}")
        raise_problems("the classical nuclei detector cannot run:", problems)


def detect_nuclei(
    pixels: np.ndarray, mpp: float, config: ClassicalConfig | None = None
) -> np.ndarray:
    """Detect nuclei in one image.

    Args:
        pixels: uint8 (h, w, 3), RGB.
        mpp: um per pixel of `pixels`.
        config: parameters; the defaults suit Papanicolaou, Giemsa and other nuclear stains.

    Returns:
        float32 (N, 4), best first: x_px, y_px (0, 0 is the centre of the first pixel), radius_um,
        score (`min_score` to 1).

    Raises:
        InputError: `pixels` is not uint8 (h, w, 3) or `mpp` is not positive.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InputError(f"pixels must be uint8 (h, w, 3), not {pixels.dtype} {pixels.shape}")
    if not mpp > 0:
        raise InputError(f"mpp must be above 0 um per pixel, not {mpp}")
    config = config or ClassicalConfig()
    height, width = pixels.shape[:2]
    work, scale_x, scale_y = _to_work_scale(pixels, mpp, config.work_um)
    if min(work.shape[:2]) < 8:
        return np.zeros((0, 4), np.float32)
    found = _detect_at_work_scale(work, mpp * scale_x, config)
    found[:, 0] = np.clip((found[:, 0] + 0.5) * scale_x - 0.5, 0, width - 1)
    found[:, 1] = np.clip((found[:, 1] + 0.5) * scale_y - 0.5, 0, height - 1)
    return found


def score_candidates(
    strength: np.ndarray, rays: RayMeasures, texture: np.ndarray, reference_step: float
) -> np.ndarray:
    """How surely each candidate is a nucleus.

    `step` is the geometric mean of three views of the same step in density: curvature of the whole
    blob, contrast with the surroundings and sharpness of the edge, the latter two on the weakest
    side. It is weighed against the unevenness inside the candidate and around it, so that a pale
    nucleus in smooth cytoplasm counts as much as a dark one in granular cytoplasm.

    Args:
        strength: float32 (N,), blob strength, in density units.
        rays: the measures of the same candidates.
        texture: float32 (N,), fine texture around each candidate, in density units.
        reference_step: a step this large scores 0.5 where there is no texture at all.

    Returns:
        float32 (N,), 0 to 1: step / (step + inner texture + outer texture + reference_step).
    """
    step = np.cbrt(strength * np.maximum(rays.contrast, 0) * np.maximum(rays.edge, 0))
    return step / (step + rays.texture + texture + np.float32(reference_step))


def _to_work_scale(
    pixels: np.ndarray, mpp: float, work_um: float
) -> tuple[np.ndarray, float, float]:
    """Shrink to about `work_um` per pixel; also returns source pixels per working pixel (x, y)."""
    height, width = pixels.shape[:2]
    if mpp >= work_um:
        return pixels, 1.0, 1.0
    size = max(1, round(width * mpp / work_um)), max(1, round(height * mpp / work_um))
    work = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return work, width / size[0], height / size[1]


def _detect_at_work_scale(pixels: np.ndarray, mpp: float, config: ClassicalConfig) -> np.ndarray:
    """`detect_nuclei` on an image at the working scale; positions in its pixels."""
    border = black_border(pixels, mpp, config.border_area_um2)
    usable = ~border if border.any() else None
    density = fill_border(nuclear_density(pixels, usable), border, round(12 / mpp))
    radii_px = np.geomspace(config.min_radius_um, config.max_radius_um, config.num_scales) / mpp
    blobs = find_blobs(density, radii_px, config.min_strength)
    blobs = blobs[~values_at(border, blobs[:, :2])]
    smooth = cv2.GaussianBlur(density, (0, 0), _SMOOTH_UM / mpp)
    rays = measure_rays(smooth, blobs[:, :2], blobs[:, 2])
    texture = values_at(fine_texture(density, mpp, config.texture_window_um), blobs[:, :2])
    score = score_candidates(blobs[:, 3], rays, texture, config.reference_step)
    good = np.flatnonzero((score >= config.min_score) & (rays.core >= config.min_density))
    kept = good[suppress(blobs[good, :2], blobs[good, 2], score[good], config.overlap)]
    found = np.column_stack([blobs[:, :2], rays.radius * mpp, score])
    return found[kept].astype(np.float32)


def fine_texture(density: np.ndarray, mpp: float, window_um: float) -> np.ndarray:
    """Mean size of the detail finer than a nucleus, in a square window.

    Args:
        density: float32 (h, w).
        mpp: um per pixel of `density`.
        window_um: side of the window.

    Returns:
        float32 (h, w): twice the mean of the absolute detail, clipped so that the sharp edges of
        neighbouring nuclei do not pass for texture.
    """
    detail = cv2.absdiff(density, cv2.GaussianBlur(density, (0, 0), _DETAIL_UM / mpp))
    side = 2 * round(window_um / mpp / 2) + 1
    clipped = np.minimum(detail, np.float32(_MAX_DETAIL))
    return 2 * cv2.blur(clipped, (side, side), borderType=cv2.BORDER_REFLECT)


def values_at(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Values of `image` (h, w) at the pixels nearest to `xy` (N, 2); (N,)."""
    column, row = np.rint(xy).astype(int).T
    height, width = image.shape
    return image[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]


class ClassicalDetector:
    """`detect_nuclei` as a detector: `detect(pixels, mpp)`.

    Args:
        config: parameters.
    """

    name = "classical"

    def __init__(self, config: ClassicalConfig | None = None) -> None:
        self.config = config or ClassicalConfig()

    def __call__(self, pixels: np.ndarray, mpp: float) -> np.ndarray:
        """Nuclei of uint8 (h, w, 3): float32 (N, 4), x_px, y_px, radius_um, score."""
        return detect_nuclei(pixels, mpp, self.config)
