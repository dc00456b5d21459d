"""How sharp a tile is: the width of its edges, measured by blurring them once more.

A step edge blurred by sigma has, looked at with a Gaussian of s, a peak slope in proportion to
1 / sqrt(s^2 + sigma^2). The ratio of the slopes at two scales s1 < s2 therefore holds no contrast
and no stain, only sigma:

    R^2 = (s2^2 + sigma^2) / (s1^2 + sigma^2)    =>    sigma^2 + s1^2 = (s2^2 - s1^2) / (R^2 - 1)

(the re-blur estimate of Zhuo and Sim, Defocus map estimation from a single image, 2011). Slopes
are those of the optical density, weighted so that strong edges decide. Scales are in um, so that
slides of any magnification compare, and coarse enough that most noise and the seams between JPEG
blocks are averaged out; the noise that is left is measured where the tile is flat.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

from cytoray.slides.grid import TILES_PER_CHUNK

if TYPE_CHECKING:
    from cytoray.slides.chunks import ChunkPixels

# Scores below this are out of focus: edges blurred by a sigma of 2.5 um or more. One in a thousand
# tiles of real slides in focus lies below it, and nearly all of those blurred by 4 um.
OUT_OF_FOCUS = 0.36

FINE_UM = 0.75
MEDIUM_UM = 1.5 * FINE_UM
# Density per um that counts as an edge: a step of 0.012 blurred by 1 um. Cytoplasm begins at 0.05.
MIN_SLOPE = 0.004
# Least share of a tile that must be edge: 0.5 % of 112 um squared is half a nucleus's outline.
MIN_EDGE_SHARE = 0.005
# An edge must also stand out of the noise: this many times its mean square.
EDGE_TO_NOISE = 4.0

# Variance in pixels that averaging over a pixel (1/12) and a central difference (1/3) bring.
_GRID_VARIANCE = 1 / 12 + 1 / 3
_DENSITY = -np.log10(np.arange(256, dtype=np.float32) + np.float32(4))
# In flat parts squared slopes are exponentially distributed: a tenth of them is below this mean.
_DECILE_OF_MEAN = -math.log(0.9)


def tile_focus(pixels: np.ndarray, mpp: float) -> np.float32:
    """Sharpness of one tile, or of any larger piece of a slide.

    Args:
        pixels: uint8 (h, w, 3).
        mpp: um per pixel; above 0.75 the measure is as coarse as the pixels.

    Returns:
        `score_of_blur` of the edges, in 0..1; NaN when there is too little structure to tell.
    """
    factor = max(1, int(FINE_UM / mpp + 1e-6))
    step_um = mpp * factor
    fine_um = max(FINE_UM, step_um)
    medium_um = fine_um * MEDIUM_UM / FINE_UM
    fine = _smooth(_density(pixels, factor), (fine_um / step_um) ** 2 - _GRID_VARIANCE)
    medium = _smooth(fine, (medium_um**2 - fine_um**2) / step_um**2)
    ratio = _slope_ratio(_squared_slope(fine, step_um), _squared_slope(medium, step_um))
    if math.isnan(ratio):
        return np.float32(np.nan)
    width_um2 = (medium_um**2 - fine_um**2) / max(ratio - 1, 1e-3)
    return np.float32(1 / math.sqrt(1 + max(width_um2 - fine_um**2 + FINE_UM**2, 0.0)))


def chunk_focus(chunk: ChunkPixels, mpp: float) -> np.ndarray:
    """Sharpness of every tile of a chunk.

    Args:
        chunk: see `read_chunk`; its halo is not looked at.
        mpp: um per pixel.

    Returns:
        float32 (64,): `tile_focus`, NaN also where there is no tile or it cannot be decoded.
    """
    scores = np.full(TILES_PER_CHUNK, np.nan, np.float32)
    height, width = chunk.pixels.shape[:2]
    for index in range(TILES_PER_CHUNK):
        x, y = chunk.tile_offset(index)
        inside = x + chunk.tile_px <= width and y + chunk.tile_px <= height
        if inside and index not in chunk.bad_tiles:
            scores[index] = tile_focus(chunk.tile(index), mpp)
    return scores


def score_of_blur(sigma_um: float) -> float:
    """Score of ideal edges blurred by a Gaussian: 0.8 when sharp, 0.42 at 2 um, 0.24 at 4 um.

    Only texture finer than an edge scores higher.
    """
    return 1 / math.sqrt(1 + FINE_UM**2 + sigma_um**2)


def _density(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Optical density up to a constant, averaged over factor x factor pixels; float32 (h, w)."""
    density = cv2.LUT(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), _DENSITY)
    if factor == 1:
        return density
    height, width = (side // factor for side in density.shape)
    whole = density[: height * factor, : width * factor]
    return cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)


def _smooth(density: np.ndarray, variance_px: float) -> np.ndarray:
    sigma = math.sqrt(variance_px)
    side = 2 * math.ceil(2.7 * sigma) + 1
    return cv2.GaussianBlur(density, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)


def _squared_slope(density: np.ndarray, step_um: float) -> np.ndarray:
    """Squared gradient, per um^2; float32 (h, w)."""
    scale = 0.5 / step_um
    dx = cv2.Sobel(density, cv2.CV_32F, 1, 0, ksize=1, scale=scale)
    dy = cv2.Sobel(density, cv2.CV_32F, 0, 1, ksize=1, scale=scale)
    cv2.multiply(dx, dx, dx)
    cv2.multiply(dy, dy, dy)
    return cv2.add(dx, dy, dx)


def _slope_ratio(fine: np.ndarray, medium: np.ndarray) -> float:
    """Ratio of the squared slopes on edges, without noise; NaN when there are too few edges."""
    fine_noise = _noise(fine)
    # White noise falls with the fourth power of the scale; JPEG's does not fall as fast.
    medium_noise = min(_noise(medium), fine_noise * (FINE_UM / MEDIUM_UM) ** 2)
    least = max(MIN_SLOPE**2, EDGE_TO_NOISE * medium_noise)
    _, edges = cv2.threshold(medium, least, 0, cv2.THRESH_TOZERO)
    if cv2.countNonZero(edges) < MIN_EDGE_SHARE * edges.size:
        return math.nan
    weight = cv2.multiply(fine, edges)
    total = cv2.sumElems(weight)[0]
    above = float(np.vdot(weight, fine)) - fine_noise * total
    below = float(np.vdot(weight, edges)) - medium_noise * total
    return above / below


def _noise(squared_slope: np.ndarray) -> float:
    """Mean of the squared slope that noise alone makes, from the flattest tenth of the picture."""
    some = squared_slope[::4, ::4].ravel()
    tenth = len(some) // 10
    return float(np.partition(some, tenth)[tenth]) / _DECILE_OF_MEAN
