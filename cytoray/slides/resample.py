"""Resampling at exact fractional positions, with a low-pass against aliasing."""

from __future__ import annotations

import math

import cv2
import numpy as np

# Enlarging by more than a tenth is done with cubic interpolation.
SHARPEN_BELOW = 0.9
# Below this (shrinking by under a fifth) linear interpolation blurs enough by itself.
LEAST_SIDE_TAP = 0.02


def resample(
    source: np.ndarray, box: tuple[float, float, float, float], width_px: int, height_px: int
) -> np.ndarray:
    """Resample a rectangle of `source` given to a fraction of a pixel.

    Args:
        source: uint8 (h, w, 3).
        box: left, top, width, height in source pixels; border pixels are repeated outside.
        width_px, height_px: size of the result.

    Returns:
        uint8 (height_px, width_px, 3): the source's own pixels where the box is whole pixels at
        1:1, else interpolated at exact positions (to 1/32 px) after a blur against aliasing.
    """
    left, top, width, height = box
    whole = (round(left), round(top))
    aligned = abs(left - whole[0]) < 1e-3 and abs(top - whole[1]) < 1e-3
    same_size = abs(width - width_px) < 1e-3 and abs(height - height_px) < 1e-3
    if aligned and same_size:
        view = source[whole[1] : whole[1] + height_px, whole[0] : whole[0] + width_px]
        if view.shape[:2] == (height_px, width_px):
            return np.ascontiguousarray(view)
    ratio_x, ratio_y = width / width_px, height / height_px
    sigma_x, sigma_y = antialias_sigma(ratio_x), antialias_sigma(ratio_y)
    if sigma_x or sigma_y:
        source = cv2.GaussianBlur(
            source,
            (3 if sigma_x else 1, 3 if sigma_y else 1),
            sigmaX=sigma_x or 1e-3,
            sigmaY=sigma_y or 1e-3,
            borderType=cv2.BORDER_REPLICATE,
        )
    enlarging = min(ratio_x, ratio_y) < SHARPEN_BELOW
    # Centre of target pixel i, as an index into source pixels: ratio * (i + 1/2) + left - 1/2.
    to_source = np.array(
        [
            [ratio_x, 0.0, left + (ratio_x - 1) / 2],
            [0.0, ratio_y, top + (ratio_y - 1) / 2],
        ]
    )
    return cv2.warpAffine(
        source,
        to_source,
        (width_px, height_px),
        flags=(cv2.INTER_CUBIC if enlarging else cv2.INTER_LINEAR) | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def antialias_sigma(ratio: float) -> float:
    """Sigma that makes a 3-tap Gaussian the low-pass for shrinking by `ratio`; 0 for none.

    Averaging over `ratio` pixels has the variance ratio²/12, of which a pixel brings 1/12 itself.
    The taps (a, 1 - 2a, a) have the variance 2a, hence a = (ratio² - 1) / 24, up to a plain mean.
    """
    side = min((ratio * ratio - 1) / 24, 0.33)
    if side < LEAST_SIDE_TAP:
        return 0.0
    return math.sqrt(-0.5 / math.log(side / (1 - 2 * side)))
