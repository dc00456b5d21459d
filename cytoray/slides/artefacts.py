"""Large things on a slide that are no cells: borders, marker pen, the dark outside of a well.

All are looked for in a picture of about 16 um per pixel: they are wide, and it is quick.
"""

from __future__ import annotations

import cv2
import numpy as np

BLACK_LEVEL = 25
COARSE_UM = 16.0
PEN_WIDTH_UM = 250.0
SURROUNDINGS_WIDTH_UM = 500.0
RIM_UM = 40.0

# Ink is even; stained groups show nuclei on cytoplasm. Spread of the density over 48 um, as a
# share of its mean.
MAX_INK_SPREAD = 0.12
# Red ink has the colour of keratin and blood, so it must be more even than those ever are.
MAX_RED_SPREAD = 0.05
MAX_SURROUNDINGS_SPREAD = 0.06
MIN_SPREAD = 0.012


def large_artefacts(rgb: np.ndarray, density: np.ndarray, mpp: float) -> np.ndarray:
    """What of a picture is border, pen, or the outside of a well.

    Args:
        rgb: uint8 (h, w, 3).
        density: float32 (h, w), see `optical_density`.
        mpp: um per pixel.

    Returns:
        bool (h, w).
    """
    factor = max(1, round(COARSE_UM / mpp))
    size = (max(1, rgb.shape[1] // factor), max(1, rgb.shape[0] // factor))
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    small_density = cv2.resize(density, size, interpolation=cv2.INTER_AREA)
    step_um = mpp * factor
    found = pen_strokes(small, small_density, step_um) | surroundings(small_density, step_um)
    whole = cv2.resize(
        found.astype(np.uint8), (rgb.shape[1], rgb.shape[0]), interpolation=cv2.INTER_NEAREST
    )
    return whole.astype(bool) | black_border(rgb, mpp)


def black_border(rgb: np.ndarray, mpp: float) -> np.ndarray:
    """Areas of pure black that touch the picture's edge or are wider than 200 um; bool (h, w)."""
    highest = cv2.max(cv2.max(rgb[..., 0], rgb[..., 1]), rgb[..., 2])
    black = cv2.inRange(highest, 0, BLACK_LEVEL)
    if not cv2.countNonZero(black):
        return np.zeros(black.shape, bool)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(black, connectivity=8)
    height, width = black.shape
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    w, h = stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT]
    at_edge = (left == 0) | (top == 0) | (left + w == width) | (top + h == height)
    large = (np.maximum(w, h) * mpp > 200) & (stats[:, cv2.CC_STAT_AREA] * mpp**2 > 100**2)
    border = at_edge | large
    border[0] = False
    # The rim of a border is blended with its neighbour.
    return cv2.dilate(border.astype(np.uint8)[labels], np.ones((5, 5), np.uint8)).astype(bool)


def pen_strokes(rgb: np.ndarray, density: np.ndarray, mpp: float) -> np.ndarray:
    """Marker pen: black or strongly coloured, and even over more than any group of cells is.

    Args:
        rgb: uint8 (h, w, 3).
        density: float32 (h, w).
        mpp: um per pixel, about 16.

    Returns:
        bool (h, w).
    """
    red, green, blue = cv2.split(rgb)
    value = cv2.max(cv2.max(red, green), blue).astype(np.float32)
    lowest = cv2.min(cv2.min(red, green), blue).astype(np.float32)
    saturation = (value - lowest) / np.maximum(value, 1)
    coloured = (saturation > 0.55) & (red < np.maximum(green, blue))
    ink = coloured | (value < 60)
    red_ink = (saturation > 0.6) & (red > green) & (red > blue)
    spread, mean = _spread(density)
    even = (ink & (spread < MAX_INK_SPREAD * np.maximum(mean, 0.2))) | (
        red_ink & (spread < MAX_RED_SPREAD * mean)
    )
    seeds = _wide(even, PEN_WIDTH_UM / mpp)
    if not seeds.any():
        return np.zeros(value.shape, bool)
    return _grown(_touching(ink | red_ink, seeds), RIM_UM / mpp)


def surroundings(density: np.ndarray, mpp: float) -> np.ndarray:
    """The grey or tinted outside of a well: even, wide, and reaching the picture's edge.

    Args:
        density: float32 (h, w).
        mpp: um per pixel, about 16.

    Returns:
        bool (h, w).
    """
    spread, mean = _spread(density)
    even = (mean > 0.05) & (spread < np.maximum(MAX_SURROUNDINGS_SPREAD * mean, MIN_SPREAD))
    wide = _wide(even, SURROUNDINGS_WIDTH_UM / mpp)
    if not wide.any():
        return wide
    count, found = cv2.connectedComponents(wide.astype(np.uint8), connectivity=8)
    labels = np.asarray(found, np.int64)
    reaching = np.zeros(count, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        reaching[np.unique(edge)] = True
    reaching[0] = False
    # Its corners are narrower than itself.
    return _grown(_touching(even, reaching[labels]), RIM_UM / mpp)


def _spread(density: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation and mean of the density over 3 x 3 pixels."""
    mean = cv2.blur(density, (3, 3))
    variance = cv2.blur(density * density, (3, 3)) - mean * mean
    return np.sqrt(np.maximum(variance, 0)), mean


def _wide(mask: np.ndarray, width_px: float) -> np.ndarray:
    """The parts of a mask in which a disc of this diameter fits, or half of one at the edge."""
    reach = int(np.ceil(width_px / 2))
    padded = np.pad(mask.astype(np.uint8), reach, mode="symmetric")
    core = (cv2.distanceTransform(padded, cv2.DIST_L2, 5) >= width_px / 2).astype(np.uint8)
    if not core.any():
        return np.zeros(mask.shape, bool)
    away = cv2.distanceTransform(1 - core, cv2.DIST_L2, 5)[reach:-reach, reach:-reach]
    return mask & (away < width_px / 2)


def _touching(mask: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The connected parts of a mask that hold a seed."""
    count, found = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    labels = np.asarray(found, np.int64)
    chosen = np.zeros(count, bool)
    chosen[np.unique(labels[seeds])] = True
    chosen[0] = False
    return chosen[labels]


def _grown(mask: np.ndarray, reach_px: float) -> np.ndarray:
    side = 2 * int(np.ceil(reach_px)) + 1
    return cv2.dilate(mask.astype(np.uint8), np.ones((side, side), np.uint8)).astype(bool)
