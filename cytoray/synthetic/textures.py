"""Random fields, outlines and folds that the cell renderer is built from (numpy in, numpy out)."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
NUM_OUTLINE_POINTS = 128


def smooth_noise(rng: np.random.Generator, height_px: int, width_px: int, grain_px: float) -> Float:
    """Return a smooth field float32 (h, w) of about unit variance, features `grain_px` wide."""
    rows = max(2, int(np.ceil(height_px / grain_px)) + 1)
    columns = max(2, int(np.ceil(width_px / grain_px)) + 1)
    coarse = rng.standard_normal((rows, columns), dtype=np.float32)
    field = cv2.resize(coarse, (width_px, height_px), interpolation=cv2.INTER_CUBIC)
    return np.asarray(field * np.float32(1.2), np.float32)


def ridges(noise: Float, sharpness: float = 5.0) -> Float:
    """Turn a smooth field into thin lines in [0, 1] along its zero crossings: fine wrinkles."""
    return np.asarray(np.exp(-np.square(noise * np.float32(sharpness))), np.float32)


def round_outline(
    rng: np.random.Generator, radius_px: float, elongation: float, roughness: float
) -> Float:
    """Return a closed blob outline float32 (128, 2) as x, y around (0, 0).

    Args:
        rng: the source of randomness.
        radius_px: radius of the circle of the same area, about.
        elongation: long over short axis, 1 is round.
        roughness: relative size of the bumps; 0.01 is smooth, 0.12 is notched.
    """
    angle = np.linspace(0, 2 * np.pi, NUM_OUTLINE_POINTS, endpoint=False)
    radius = np.full_like(angle, radius_px)
    for order in range(2, 8):
        size = roughness * rng.normal() / (order - 1)
        radius += radius_px * size * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    radius = np.maximum(radius, 0.5 * radius_px)
    stretch = np.sqrt(elongation)
    points = np.stack([radius * stretch * np.cos(angle), radius / stretch * np.sin(angle)], axis=1)
    return _rotate(points, rng.uniform(0, 2 * np.pi))


def polygon_outline(rng: np.random.Generator, radius_px: float, elongation: float) -> Float:
    """Return a polygonal outline with blunt corners and ragged sides, float32 (128, 2), as x, y.

    Superficial and intermediate squamous cells are flat polygons of five to eight sides.
    """
    corners = int(rng.integers(5, 9))
    step = 2 * np.pi / corners
    corner_angle = (np.arange(corners) + rng.uniform(-0.32, 0.32, corners)) * step
    corner_radius = radius_px * rng.uniform(0.88, 1.22, corners)
    corner_xy = corner_radius[:, None] * np.stack([np.cos(corner_angle), np.sin(corner_angle)], 1)
    closed = np.concatenate([corner_xy, corner_xy[:1]])
    side = np.linspace(0, corners, NUM_OUTLINE_POINTS, endpoint=False)
    points = np.stack([np.interp(side, np.arange(corners + 1), closed[:, i]) for i in (0, 1)], 1)
    bulge = rng.normal(0.05, 0.06, corners)[side.astype(int)] * np.sin(np.pi * (side % 1.0))
    ragged = rng.normal(0, 0.014, corners * 4)[(side * 4).astype(int)]
    ragged = ragged + rng.normal(0, 0.012, NUM_OUTLINE_POINTS)
    points *= (1 + bulge + ragged)[:, None]
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    padded = np.concatenate([points[-2:], points, points[:2]])
    points = np.stack([np.convolve(padded[:, i], kernel, "valid") for i in (0, 1)], axis=1)
    stretch = np.sqrt(elongation)
    return _rotate(points * (stretch, 1 / stretch), rng.uniform(0, 2 * np.pi))


def _rotate(points: NDArray[np.float64], angle: float) -> Float:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.asarray(points @ np.array([[cos, sin], [-sin, cos]]), np.float32)


def fill(
    outline: NDArray[np.floating], height_px: int, width_px: int, soft_px: float = 0.8
) -> Float:
    """Rasterise an outline (x, y in patch pixels) to an anti-aliased mask (h, w) in [0, 1]."""
    canvas = np.zeros((height_px, width_px), np.uint8)
    fixed_point = np.round(outline * 16).astype(np.int32)
    cv2.fillPoly(canvas, [fixed_point], 255, lineType=cv2.LINE_AA, shift=4)
    mask = canvas.astype(np.float32) / 255
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), soft_px), np.float32)


def draw_fold(
    rng: np.random.Generator, height_px: int, width_px: int, reach_px: float, thickness_px: float
) -> Float:
    """Return one soft curved crease across the patch, float32 (h, w) in [0, 1]."""
    start = np.array([width_px, height_px]) / 2 + rng.uniform(-0.6, 0.6, 2) * reach_px
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.16, 14))
    steps = (
        np.stack([np.cos(heading), np.sin(heading)], axis=1) * reach_px * rng.uniform(0.05, 0.12)
    )
    points = np.round((start + np.cumsum(steps, axis=0)) * 16).astype(np.int32)
    canvas = np.zeros((height_px, width_px), np.uint8)
    thickness = max(1, round(thickness_px))
    cv2.polylines(canvas, [points], False, 255, thickness, cv2.LINE_AA, shift=4)
    crease = cv2.GaussianBlur(canvas.astype(np.float32) / 255, (0, 0), 0.6 * thickness_px)
    return np.asarray(crease, np.float32)


def fold_over(rng: np.random.Generator, mask: Float, reach_px: float) -> Float:
    """Fold one margin of a cell over itself: the flap is mirrored in and its layer count becomes 2.

    Args:
        rng: the source of randomness.
        mask: cell mask (h, w) in [0, 1], centred in the patch.
        reach_px: radius of the cell.

    Returns:
        Number of layers, float32 (h, w): 0 outside, 1 single, 2 under the flap.
    """
    height_px, width_px = mask.shape
    angle = rng.uniform(0, 2 * np.pi)
    normal = np.array([np.cos(angle), np.sin(angle)])
    offset = rng.uniform(0.55, 0.8) * reach_px
    centre = np.array([width_px - 1, height_px - 1]) / 2
    grid_y, grid_x = np.mgrid[0:height_px, 0:width_px].astype(np.float32)
    beyond = (grid_x - centre[0]) * normal[0] + (grid_y - centre[1]) * normal[1] - offset
    kept = mask * np.clip(0.5 - beyond / 2, 0, 1)
    flap = mask - kept
    mirror = np.eye(2) - 2 * np.outer(normal, normal)
    shift = centre + offset * normal - mirror @ (centre + offset * normal)
    matrix = np.concatenate([mirror, shift[:, None]], axis=1).astype(np.float32)
    flap = cv2.warpAffine(flap, matrix, (width_px, height_px), flags=cv2.INTER_LINEAR)
    return np.asarray(kept + np.minimum(flap, kept), np.float32)


def centre_distance(height_px: int, width_px: int) -> Float:
    """Return the distance of every pixel (h, w) from the middle of the patch."""
    y = np.arange(height_px, dtype=np.float32)[:, None] - np.float32((height_px - 1) / 2)
    x = np.arange(width_px, dtype=np.float32)[None] - np.float32((width_px - 1) / 2)
    return np.asarray(np.hypot(x, y), np.float32)
