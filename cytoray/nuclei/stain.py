"""Nuclear stain density: what hematoxylin (or Giemsa's azure) adds and the counterstains do not.

Eosin, Orange G and haemoglobin absorb green and blue but let red through; Light Green and other
cyan counterstains absorb red but let green through. Only the nuclear stain takes both, so the
geometric mean of the red and the green optical density is large in nuclei and small in cytoplasm
of any colour, in red blood cells and on glass, with no stain matrix to estimate.
"""

from __future__ import annotations

import cv2
import numpy as np

_LOG_OFFSET = 4.0  # grey levels; keeps the density of near-black pixels finite and its noise small
_GLASS_QUANTILE = 0.95
_GLASS_FLOOR = 128  # a chunk wholly under cells must not take its cytoplasm for glass
_BLACK_LEVEL = 25  # brighter than JPEG noise around pure black, darker than any stained nucleus


def glass_level(channel: np.ndarray, usable: np.ndarray | None = None) -> int:
    """Grey level of empty glass in one uint8 channel (h, w): its 95th percentile, at least 128.

    Args:
        channel: uint8 (h, w).
        usable: bool (h, w); False where pixels are no image (borders).
    """
    values = channel if usable is None else channel[usable]
    counts = np.bincount(values.ravel(), minlength=256)
    level = np.searchsorted(np.cumsum(counts), _GLASS_QUANTILE * max(values.size, 1))
    return int(max(min(level, 255), _GLASS_FLOOR))


def nuclear_density(pixels: np.ndarray, usable: np.ndarray | None = None) -> np.ndarray:
    """Nuclear stain density of an RGB image.

    Args:
        pixels: uint8 (h, w, 3).
        usable: bool (h, w); False where pixels are no image (borders).

    Returns:
        float32 (h, w): sqrt(OD_red * OD_green), OD in log10 units, 0 on glass, about 0.3 to 1.2 in
        nuclei.
    """
    red, green = (np.ascontiguousarray(pixels[..., c]) for c in (0, 1))
    levels = np.arange(256, dtype=np.float32) + _LOG_OFFSET
    root_density = [
        np.sqrt(np.maximum(np.log10((glass_level(c, usable) + _LOG_OFFSET) / levels), 0.0))
        for c in (red, green)
    ]
    return cv2.multiply(
        cv2.LUT(red, root_density[0].astype(np.float32)),
        cv2.LUT(green, root_density[1].astype(np.float32)),
    )


def black_border(pixels: np.ndarray, mpp: float, min_area_um2: float) -> np.ndarray:
    """Large near-black areas: scanner borders and the corners of rotated images.

    Args:
        pixels: uint8 (h, w, 3).
        mpp: um per pixel.
        min_area_um2: smaller dark areas are left alone (a very dark nucleus is no border).

    Returns:
        bool (h, w), dilated by two pixels for the blur and ringing at its rim.
    """
    dark = (pixels.max(axis=2) < _BLACK_LEVEL).astype(np.uint8)
    if dark.sum() * mpp**2 < min_area_um2:
        return np.zeros(dark.shape, bool)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(dark, connectivity=4)
    large = stats[:, cv2.CC_STAT_AREA] * mpp**2 >= min_area_um2
    large[0] = False
    return cv2.dilate(large[labels].astype(np.uint8), np.ones((5, 5), np.uint8)) > 0


def fill_border(density: np.ndarray, border: np.ndarray, reach_px: int) -> np.ndarray:
    """Replace `border` pixels by the mean of the image pixels within `reach_px`, so no edge shows.

    Args:
        density: float32 (h, w).
        border: bool (h, w).
        reach_px: half width of the averaging window.

    Returns:
        float32 (h, w); pixels with no image near them become 0 (glass).
    """
    if not border.any():
        return density
    window = (2 * reach_px + 1, 2 * reach_px + 1)
    inside = (~border).astype(np.float32)
    weight = cv2.blur(inside, window)
    mean = cv2.blur(density * inside, window) / np.maximum(weight, 1e-3)
    return np.where(border, mean, density).astype(np.float32)
