"""Rays: how a density map falls off around a candidate, direction by direction.

A nucleus is darker than what surrounds it on (nearly) every side; a fold or an overlap of two
cells is not. Contrast and edge are therefore read along rays and judged by a low quantile over the
directions, never by their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

NUM_RAYS = 16
_NUM_STEPS = 20
_REACH = 2.5  # rays go out to this many radii
_CORE, _RING = 0.6, (1.4, 2.1)  # radii of the core and of the surrounding ring
_EDGE_STEPS = 4  # an edge is the fall over this many steps: half a radius
_BATCH = 8192  # rows of one remap; OpenCV takes at most 32,766
_WEAK_SIDE = 0.1


@dataclass(frozen=True, kw_only=True)
class RayMeasures:
    """Measures of N candidates, all float32 (N,), in units of the density unless said.

    Attributes:
        core: mean density within 0.6 radii.
        texture: standard deviation of the density within the core.
        contrast: core minus surrounding ring, in the weakest tenth of directions.
        edge: steepest fall over half a radius, in the weakest tenth of directions.
        radius: median distance to the steepest fall, px.
    """

    core: np.ndarray
    texture: np.ndarray
    contrast: np.ndarray
    edge: np.ndarray
    radius: np.ndarray


def sample_rays(density: np.ndarray, xy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Densities along rays.

    Args:
        density: float32 (h, w).
        xy: float32 (N, 2) centres, px.
        radius: float32 (N,) px.

    Returns:
        float32 (N, NUM_RAYS, 20): bilinear samples from the centre out to 2.5 radii.
    """
    cos, sin = ray_directions()
    rho = ray_distances()
    out = np.empty((len(xy), NUM_RAYS * len(rho)), np.float32)
    for start in range(0, len(xy), _BATCH):
        part = slice(start, start + _BATCH)
        reach = radius[part, None, None] * rho
        map_x = xy[part, 0, None, None] + reach * cos[:, None]
        map_y = xy[part, 1, None, None] + reach * sin[:, None]
        rows = len(map_x)
        out[part] = cv2.remap(
            density,
            map_x.reshape(rows, -1).astype(np.float32),
            map_y.reshape(rows, -1).astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT,
        )
    return out.reshape(len(xy), NUM_RAYS, len(rho))


def ray_directions() -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of each ray, float32 (NUM_RAYS,)."""
    angle = np.arange(NUM_RAYS, dtype=np.float32) * np.float32(2 * np.pi / NUM_RAYS)
    return np.cos(angle), np.sin(angle)


def ray_distances() -> np.ndarray:
    """Distance of each sample from the centre, in radii, float32 (20,)."""
    return (np.arange(_NUM_STEPS, dtype=np.float32) + 0.5) / _NUM_STEPS * np.float32(_REACH)


def measure_rays(density: np.ndarray, xy: np.ndarray, radius: np.ndarray) -> RayMeasures:
    """Measure candidates at `xy` of about `radius`; arguments as in `sample_rays`."""
    profiles = sample_rays(density, xy, radius)
    rho = ray_distances()
    core = profiles[:, :, rho < _CORE]
    ring = profiles[:, :, (rho > _RING[0]) & (rho < _RING[1])].mean(axis=2)
    level = core.mean(axis=(1, 2))
    fall = (profiles[:, :, :-_EDGE_STEPS] - profiles[:, :, _EDGE_STEPS:])[:, :, 2:14]
    at = fall.argmax(axis=2)
    distance = (rho[at + 2] + rho[at + 2 + _EDGE_STEPS]) / 2 * radius[:, None]
    return RayMeasures(
        core=level,
        texture=core.std(axis=(1, 2)),
        contrast=_weak_side(level[:, None] - ring),
        edge=_weak_side(fall.max(axis=2)),
        radius=np.median(distance, axis=1),
    )


def _weak_side(values: np.ndarray) -> np.ndarray:
    """Low quantile over the directions, (N, NUM_RAYS) to (N,)."""
    if len(values) == 0:
        return np.zeros(0, np.float32)
    return np.quantile(values, _WEAK_SIDE, axis=1).astype(np.float32)
