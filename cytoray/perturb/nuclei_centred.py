"""Nuclei-Centred Perturbation (Cyto-SSL, Algorithm 1): keep some nuclei, scramble the rest.

Frame: tile pixels; the pixel in row i and column j is the point (x, y) = (j, i).
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from cytoray.errors import InputError, choose
from cytoray.perturb.views import CropPolicy, sample_views

CENTRES = ("retained", "all")


class NucleiViews(NamedTuple):
    """What Algorithm 1 makes of one tile.

    Attributes:
        tile: uint8 (S, S, 3), perturbed.
        views: float32 (V, NUM_VIEW_PARAMS), see `cytoray.perturb.views.VIEW_PARAMS`.
        retained: bool (N,), which of the nuclei were retained.
        has_nuclei: False for a tile without a nucleus inside: its crops are random (count these).
    """

    tile: np.ndarray
    views: np.ndarray
    retained: np.ndarray
    has_nuclei: bool


def inside_tile(nuclei_xy_px: np.ndarray, tile_px: int) -> np.ndarray:
    """Return bool (N,): which nuclei centres lie in [0, tile_px) on both axes."""
    x, y = nuclei_xy_px[:, 0], nuclei_xy_px[:, 1]
    return (x >= 0) & (x < tile_px) & (y >= 0) & (y < tile_px)


def retain_nuclei(
    inside: np.ndarray, rng: np.random.Generator, retain_fraction: tuple[float, float] = (0.5, 1.0)
) -> np.ndarray:
    """Draw the random subset of nuclei to retain.

    Args:
        inside: bool (N,), the nuclei whose centre is in the tile; at least one of them is retained
            when there is any, so that the tile keeps a cell to crop.
        rng: the tile's generator.
        retain_fraction: the share retained is drawn uniformly from this range.

    Returns:
        bool (N,), at least one True when N > 0.
    """
    num_nuclei = len(inside)
    fraction = rng.uniform(*retain_fraction)
    order = rng.permutation(num_nuclei)
    num_kept = min(num_nuclei, max(1, round(fraction * num_nuclei)))
    retained = np.zeros(num_nuclei, bool)
    retained[order[:num_kept]] = True
    if inside.any() and not (retained & inside).any():
        retained[order[0]] = False
        retained[order[inside[order].argmax()]] = True
    return retained


def near_mask(centres_xy_px: np.ndarray, radius_px: float, tile_px: int) -> np.ndarray:
    """Return bool (S, S): pixels at most `radius_px` from one of the centres, by disc stamping.

    Args:
        centres_xy_px: float (N, 2), x and y; centres outside the tile stamp the part that reaches
            into it.
        radius_px: the radius; a pixel at exactly this distance is near.
        tile_px: S.
    """
    near = np.zeros((tile_px, tile_px), bool)
    axis = np.arange(tile_px, dtype=np.float64)
    centres = np.asarray(centres_xy_px, np.float64)
    dx2 = (axis - centres[:, :1]) ** 2
    left2 = radius_px**2 - (axis - centres[:, 1:]) ** 2
    low = np.clip(np.floor(centres - radius_px), 0, tile_px).astype(int).tolist()
    high = np.clip(np.ceil(centres + radius_px) + 1, 0, tile_px).astype(int).tolist()
    for k, ((x0, y0), (x1, y1)) in enumerate(zip(low, high, strict=True)):
        near[y0:y1, x0:x1] |= dx2[k, None, x0:x1] <= left2[k, y0:y1, None]
    return near


def shuffle_pixels(tile: np.ndarray, far: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a copy of `tile` whose pixels under `far` are permuted uniformly among themselves.

    Args:
        tile: uint8 (S, S, 3); a pixel's three channels stay together.
        far: bool (S, S).
        rng: the tile's generator.
    """
    pixels = cv2.cvtColor(np.ascontiguousarray(tile), cv2.COLOR_RGB2RGBA)  # 4 bytes: one uint32
    packed = pixels.view(np.uint32).reshape(-1)
    source = np.flatnonzero(far)
    rng.shuffle(source)  # numpy's fast path is for 8-byte items: indices, not pixels
    packed[far.reshape(-1)] = packed.take(source)
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)


def perturb(
    tile: np.ndarray,
    nuclei_xy_px: np.ndarray,
    radius_px: float,
    rng: np.random.Generator,
    retain_fraction: tuple[float, float] = (0.5, 1.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Retain a random part of the nuclei and shuffle what is far from all of them (Alg. 1, line 2).

    Pixels farther than `radius_px` from every retained nucleus are randomly permuted among
    themselves; the others are untouched. A tile without a nucleus inside comes back unchanged.

    Args:
        tile: uint8 (S, S, 3).
        nuclei_xy_px: float (N, 2) or wider (further columns are ignored), centres in tile pixels.
            Centres outside [0, S) may be given: their disc keeps the pixels it reaches.
        radius_px: r; the paper's 50 px at 40x is 12.5 um, so r = 12.5 / mpp.
        rng: the tile's generator (`tile_rng`).
        retain_fraction: range of the share of nuclei retained; at least one always is.

    Returns:
        The new tile, uint8 (S, S, 3) (the same object when unchanged), and bool (N,), the nuclei
        retained (all of them when the tile is unchanged).

    Raises:
        InputError: the tile is not a square uint8 image, or radius or fraction is out of range.
    """
    _check(tile, radius_px, retain_fraction)
    nuclei = _xy(nuclei_xy_px)
    inside = inside_tile(nuclei, len(tile))
    if not inside.any():
        return tile, np.ones(len(nuclei), bool)
    retained = retain_nuclei(inside, rng, retain_fraction)
    near = near_mask(nuclei[retained], radius_px, len(tile))
    return shuffle_pixels(tile, ~near, rng), retained


def nuclei_centred_views(
    tile: np.ndarray,
    nuclei_xy_px: np.ndarray,
    radius_px: float,
    policy: CropPolicy,
    rng: np.random.Generator,
    *,
    retain_fraction: tuple[float, float] = (0.5, 1.0),
    perturbed: bool = True,
    centres: str = "retained",
) -> NucleiViews:
    """Run Algorithm 1 on one tile: perturb it, then draw the views around its nuclei.

    Args:
        tile: uint8 (S, S, 3).
        nuclei_xy_px: float (N, 2) or wider, centres in tile pixels.
        radius_px: r of `perturb`.
        policy: crops and augmentations.
        rng: the tile's generator (`tile_rng`).
        retain_fraction: see `perturb`.
        perturbed: False leaves the pixels alone (the paper's ablation without perturbation) and
            retains every nucleus.
        centres: crops are centred on the `retained` nuclei, or on `all`, scrambled ones included.
            A point drawn from a uniform random part of P is a uniform point of P, so both sample
            P as the paper writes; `retained` never centres a crop on noise.
    """
    choose("crop centres", centres, CENTRES)
    nuclei = _xy(nuclei_xy_px)
    retained = np.ones(len(nuclei), bool)
    if perturbed:
        tile, retained = perturb(tile, nuclei, radius_px, rng, retain_fraction)
    points = nuclei[retained] if centres == "retained" else nuclei
    views = sample_views(points, len(tile), policy, rng)
    return NucleiViews(tile, views, retained, bool(inside_tile(nuclei, len(tile)).any()))


def _xy(nuclei_xy_px: np.ndarray) -> np.ndarray:
    """The x and y columns as float64 (N, 2); an empty array of any shape is (0, 2)."""
    nuclei = np.asarray(nuclei_xy_px, np.float64)
    return nuclei[:, :2] if nuclei.size else nuclei.reshape(0, 2)


def _check(tile: np.ndarray, radius_px: float, retain_fraction: tuple[float, float]) -> None:
    if tile.dtype != np.uint8 or tile.ndim != 3 or tile.shape != (len(tile), len(tile), 3):
        raise InputError(
            f"a tile must be uint8 of shape (S, S, 3), not {tile.dtype} {tile.shape}; "
            "convert it to square RGB first"
        )
    if not radius_px >= 0:
        raise InputError(f"radius_px must be 0 or more, not {radius_px}")
    low, high = retain_fraction
    if not 0 <= low <= high <= 1:
        raise InputError(f"retain_fraction must be 0 <= low <= high <= 1, not {retain_fraction}")
