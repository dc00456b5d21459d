"""Blobs in scale space: where a density map curves downwards in every direction.

The measure is the smaller of the two downward principal curvatures (eigenvalues of the Hessian),
normalised by scale. A fold or the rim of a cell curves across its length only and scores nothing,
where a Laplacian would still see half a blob (Lindeberg 1998; Frangi et al. 1998).
"""

from __future__ import annotations

import cv2
import numpy as np

_SECOND_X = np.array([[1, -2, 1]], np.float32)
_SECOND_Y = _SECOND_X.T.copy()
_SECOND_XY = np.array([[1, 0, -1], [0, 0, 0], [-1, 0, 1]], np.float32) / 4
_MAX_SIGMA_PX = 3.2  # larger scales are computed on a halved image: same result, a quarter the work


def blob_strength(density: np.ndarray, sigma_px: float) -> np.ndarray:
    """Scale-normalised smaller downward curvature.

    Args:
        density: float32 (h, w).
        sigma_px: Gaussian scale; a disc of radius r answers most at about r / sqrt(2).

    Returns:
        float32 (h, w): sigma^2 * min(-lambda_1, -lambda_2), in units of `density`.
    """
    smooth = cv2.GaussianBlur(density, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT)
    xx = cv2.filter2D(smooth, -1, _SECOND_X, borderType=cv2.BORDER_REFLECT)
    yy = cv2.filter2D(smooth, -1, _SECOND_Y, borderType=cv2.BORDER_REFLECT)
    xy = cv2.filter2D(smooth, -1, _SECOND_XY, borderType=cv2.BORDER_REFLECT)
    half_spread = cv2.magnitude(cv2.subtract(xx, yy) * 0.5, xy)
    strength = cv2.addWeighted(xx, -0.5, yy, -0.5, 0.0)
    return cv2.subtract(strength, half_spread) * np.float32(sigma_px**2)


def find_blobs(density: np.ndarray, radii_px: np.ndarray, threshold: float) -> np.ndarray:
    """Local maxima of the blob strength at each scale.

    Args:
        density: float32 (h, w).
        radii_px: radii looked for, ascending.
        threshold: smallest strength kept, in units of `density`.

    Returns:
        float32 (N, 4): x_px, y_px (subpixel), radius_px (of the scale), strength.
    """
    found = []
    level, factor = density, 1.0
    for radius in radii_px:
        while radius / factor / np.sqrt(2) > _MAX_SIGMA_PX and min(level.shape) >= 16:
            level, factor = (
                cv2.resize(level, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
                (factor * 2),
            )
        strength = blob_strength(level, float(radius / factor / np.sqrt(2)))
        x, y, value = _peaks(strength, threshold)
        x, y = (x + 0.5) * factor - 0.5, (y + 0.5) * factor - 0.5
        found.append(np.column_stack([x, y, np.full(len(x), radius), value]))
    return np.concatenate(found).astype(np.float32)


def _peaks(strength: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Subpixel 3x3 maxima above `threshold`: x, y, value, each float (N,)."""
    top = cv2.dilate(strength, np.ones((3, 3), np.uint8))
    y, x = np.nonzero((strength >= top) & (strength > threshold))
    height, width = strength.shape
    xi, yi = np.clip(x, 1, width - 2), np.clip(y, 1, height - 2)
    value = strength[y, x]
    shifts = []
    for low, mid, high in (
        (strength[yi, xi - 1], strength[yi, xi], strength[yi, xi + 1]),
        (strength[yi - 1, xi], strength[yi, xi], strength[yi + 1, xi]),
    ):
        curve = np.maximum(2 * mid - low - high, 1e-9)
        shifts.append(np.clip((high - low) / (2 * curve), -0.5, 0.5))
    inner = (xi == x) & (yi == y)
    return x + np.where(inner, shifts[0], 0), y + np.where(inner, shifts[1], 0), value


def suppress(
    xy: np.ndarray, radius: np.ndarray, score: np.ndarray, overlap: float = 1.0
) -> np.ndarray:
    """Greedy non-maximum suppression across places and scales.

    A blob is dropped when a better kept one lies within `overlap` times the larger of their radii.

    Args:
        xy: float (N, 2).
        radius: float (N,), in the unit of `xy`.
        score: float (N,).
        overlap: fraction of the larger radius.

    Returns:
        int64 (K,): the kept indices, best first.
    """
    from scipy.spatial import KDTree  # here: it would be most of what a reader's start costs

    order = np.argsort(-score, kind="stable")
    if len(order) < 2:
        return order
    xy, radius = xy[order], radius[order]
    pairs = KDTree(xy).query_pairs(overlap * float(radius.max()), output_type="ndarray")
    gap = np.hypot(*(xy[pairs[:, 0]] - xy[pairs[:, 1]]).T)
    pairs = pairs[gap < overlap * np.maximum(radius[pairs[:, 0]], radius[pairs[:, 1]])]
    better, worse = pairs.min(axis=1), pairs.max(axis=1)
    alive, undecided = np.ones(len(xy), bool), np.ones(len(xy), bool)
    while undecided.any():
        open_pair = alive[better] & alive[worse] & undecided[better]
        beaten = np.zeros(len(xy), bool)
        beaten[worse[open_pair]] = True
        kept = undecided & ~beaten
        undecided &= ~kept
        losers = worse[kept[better]]
        alive[losers] = False
        undecided[losers] = False
    return order[alive]
