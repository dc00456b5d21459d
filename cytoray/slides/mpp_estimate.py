"""um per pixel from the size of nuclei: rough, and only for a user who asks for it.

A detector is told one um per pixel after another; a nucleus is what it finds at the same place with
the same size in pixels whichever of them it is told, where texture comes and goes. The most common
size in pixels is then taken for that of an ordinary nucleus.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cytoray.errors import SlideError
from cytoray.slides.foreground import background_rgb, optical_density
from cytoray.slides.readers_base import SlideReader

PixelDetector = Callable[[np.ndarray, float], np.ndarray]

# Nuclei of intermediate (35 um2) and parabasal cells (50 um2) have radii of 3.3 and 4.0 um, those
# of lymphocytes about 3.5 um, the lobes of a granulocyte less (Bethesda System, 3rd edition).
EXPECTED_RADIUS_UM = 3.5
ASSUMED_MPP = tuple(np.geomspace(0.1, 2.0, 14).tolist())
REGION_PX = 1024
NUM_REGIONS = 6
MIN_OPTICAL_DENSITY = 0.06
# One object: centres within half a radius, radii within this ratio, and found under this many mpp.
SAME_RADIUS_RATIO = 1.3
MIN_TIMES_FOUND = 5
MIN_NUCLEI = 10
# Sizes are smoothed over about a third; a smaller size nearly as common as the most common is
# taken, since cells found whole are larger than their nuclei.
SMOOTHING_LOG = 0.35
NEARLY_AS_COMMON = 0.7


def mpp_from_nuclei(reader: SlideReader, detector: PixelDetector) -> float:
    """Estimate a slide's um per level-0 pixel; half or double the truth is usual.

    Args:
        reader: an open slide.
        detector: pixels, mpp -> float32 (N, 4): x_px, y_px, radius_um, score.

    Raises:
        SlideError: `mpp_not_estimated` when fewer than 10 nuclei are found.
    """
    found = [np.zeros(0)]
    for region in foreground_regions(reader):
        try:
            pixels = reader.read_level(0, *region)
        except SlideError:  # a damaged spot is indexing's to report
            continue
        found.append(lasting_radii_px(pixels, detector))
    radii_px = np.concatenate(found)
    if len(radii_px) < MIN_NUCLEI:
        raise SlideError(
            "mpp_not_estimated",
            f"{len(radii_px)} nuclei are too few to estimate um/px from; give this slide's in the "
            "manifest's `mpp` column",
        )
    return EXPECTED_RADIUS_UM / common_radius_px(radii_px)


def foreground_regions(reader: SlideReader) -> list[tuple[int, int, int, int]]:
    """Squares of level 0 with the most stained matter: x, y, width, height, at most six."""
    info = reader.info
    width, height = info.width_px_level0, info.height_px_level0
    small = reader.thumbnail(1024)
    stained = optical_density(small, background_rgb(small)) > MIN_OPTICAL_DENSITY
    scale = small.shape[1] / width
    side_x, side_y = min(REGION_PX, width), min(REGION_PX, height)
    regions = []
    for y in range(0, height - side_y + 1, side_y):
        for x in range(0, width - side_x + 1, side_x):
            top, left = int(y * scale), int(x * scale)
            bottom, right = int((y + side_y) * scale) + 1, int((x + side_x) * scale) + 1
            regions.append((float(stained[top:bottom, left:right].mean()), x, y))
    best = sorted(regions, key=lambda region: (-region[0], region[1:]))[:NUM_REGIONS]
    return [(x, y, side_x, side_y) for share, x, y in best if share > 0]


def lasting_radii_px(pixels: np.ndarray, detector: PixelDetector) -> np.ndarray:
    """Radii of what is found alike under at least five of the assumed mpp.

    Args:
        pixels: uint8 (h, w, 3).
        detector: see `mpp_from_nuclei`.

    Returns:
        float64 (N,), pixels.
    """
    from scipy.spatial import KDTree  # here: it would be most of what a reader's start costs

    found = []
    for number, mpp in enumerate(ASSUMED_MPP):
        nuclei = np.asarray(detector(pixels, mpp), np.float64).reshape(-1, 4)
        numbers = np.full(len(nuclei), number)
        found.append(np.column_stack([nuclei[:, :2], nuclei[:, 2] / mpp, nuclei[:, 3], numbers]))
    x, y, radius, score, number = np.concatenate(found).T
    free = np.ones(len(x), bool)
    lasting = []
    if not len(x):
        return np.zeros(0)
    tree = KDTree(np.column_stack([x, y]))
    for best in np.argsort(-score, kind="stable"):
        if not free[best]:
            continue
        near = np.array(tree.query_ball_point((x[best], y[best]), 0.5 * radius[best]))
        ratio = np.abs(np.log(radius[near] / radius[best]))
        same = near[free[near] & (ratio < np.log(SAME_RADIUS_RATIO))]
        free[same] = False
        if len(np.unique(number[same])) >= MIN_TIMES_FOUND:
            lasting.append(np.median(radius[same]))
    return np.array(lasting, np.float64)


def common_radius_px(radii_px: np.ndarray) -> float:
    """The smallest of the most common radii: a mode of their smoothed logarithms.

    Args:
        radii_px: float (N,), N at least 1.
    """
    logs = np.log(radii_px)
    axis = np.linspace(logs.min() - 1, logs.max() + 1, 512)
    density = np.exp(-0.5 * ((axis[:, None] - logs) / SMOOTHING_LOG) ** 2).sum(axis=1)
    peak = (density[1:-1] >= density[:-2]) & (density[1:-1] > density[2:])
    common = np.flatnonzero(peak & (density[1:-1] >= NEARLY_AS_COMMON * density.max())) + 1
    return float(np.exp(axis[common[0]]))
