"""Block masks on the global crops, made from counters: the same for any number of ranks.

A global batch of B tiles has B*G global crops, numbered tile by tile. Which of them are masked, and
in which band of ratios, is one seeded permutation of that list; the blocks of a crop come from a
generator of its own, seeded by (seed, step, number). So each rank makes its slice alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MIN_BLOCK_PATCHES = 4
MIN_ASPECT = 0.3
TRIES_PER_BLOCK = 10
_STREAM_CHOICE, _STREAM_BLOCKS = 11, 12


@dataclass(frozen=True, kw_only=True)
class MaskPolicy:
    """How much is masked: exactly int(crops * share) crops, ratios even over [low, high]."""

    share: float = 0.5
    ratio_min: float = 0.1
    ratio_max: float = 0.5


@dataclass(frozen=True)
class MaskedPatches:
    """Masks of a slice of the crops, with what the loss needs of them.

    Attributes:
        mask: bool (crops, patches), row-major patches, True = masked.
        index: int64 (M,), flat positions of the masked patches.
        weight: float32 (M,), 1 / (masked patches of the same crop).
    """

    mask: np.ndarray
    index: np.ndarray
    weight: np.ndarray


def mask_bands(*, seed: int, step: int, num_crops: int, policy: MaskPolicy) -> np.ndarray:
    """The band of mask ratios of each crop of the global batch.

    Returns:
        int64 (num_crops,): -1 for a crop that is not masked, else its band, each band of
        0..int(num_crops * share)-1 once.
    """
    masked = int(num_crops * policy.share)
    rng = np.random.default_rng((seed, step, _STREAM_CHOICE))
    bands = np.full(num_crops, -1, dtype=np.int64)
    bands[rng.permutation(num_crops)[:masked]] = np.arange(masked)
    return bands


def make_block_masks(
    seed: int,
    step: int,
    *,
    num_crops: int,
    start: int,
    stop: int,
    grid: tuple[int, int],
    policy: MaskPolicy | None = None,
) -> MaskedPatches:
    """Masks of the crops [start, stop) of a step.

    Args:
        seed: the run's seed.
        step: step of the run.
        num_crops: global crops of the global batch.
        start: first crop of this rank.
        stop: one past its last.
        grid: patches per column and per row.
        policy: shares and ratios; None: DINOv2's.
    """
    policy = policy or MaskPolicy()
    bands = mask_bands(seed=seed, step=step, num_crops=num_crops, policy=policy)
    edges = np.linspace(policy.ratio_min, policy.ratio_max, int(bands.max(initial=-1)) + 2)
    rows, columns = grid
    mask = np.zeros((stop - start, rows, columns), dtype=bool)
    for crop in range(start, stop):
        band = bands[crop]
        if band < 0:
            continue
        rng = np.random.default_rng((seed, step, _STREAM_BLOCKS, crop))
        ratio = rng.uniform(edges[band], edges[band + 1])
        target = max(1, int(rows * columns * ratio))
        mask[crop - start] = block_mask(grid, target, rng)
    flat = mask.reshape(stop - start, rows * columns)
    index = np.flatnonzero(flat)
    per_crop = flat.sum(1)
    weight = (1.0 / np.maximum(per_crop, 1)).astype(np.float32)[index // (rows * columns)]
    return MaskedPatches(mask=flat, index=index, weight=weight)


def block_mask(grid: tuple[int, int], target: int, rng: np.random.Generator) -> np.ndarray:
    """Fill a patch grid with rectangles until `target` patches are masked or no more fits.

    A rectangle has between `MIN_BLOCK_PATCHES` and all missing patches, its aspect is log-uniform
    in [0.3, 1 / 0.3]; it counts if it adds at least one patch and not too many.

    Returns:
        bool (rows, columns) with between 1 and `target` True.
    """
    rows, columns = grid
    mask = np.zeros(grid, dtype=bool)
    masked = 0
    while masked < target:
        added = _add_block(mask, target - masked, rng)
        if added == 0:
            break
        masked += added
    if masked == 0:
        mask[rng.integers(rows), rng.integers(columns)] = True
    return mask


def _add_block(mask: np.ndarray, missing: int, rng: np.random.Generator) -> int:
    rows, columns = mask.shape
    limit = math.log(1.0 / MIN_ASPECT)
    smallest = min(MIN_BLOCK_PATCHES, missing)
    for size, shape, y, x in rng.random((TRIES_PER_BLOCK, 4)).tolist():
        area = smallest + size * (missing - smallest)
        aspect = math.exp(limit * (2.0 * shape - 1.0))
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, left = int(y * (rows - height + 1)), int(x * (columns - width + 1))
        block = mask[top : top + height, left : left + width]
        new = height * width - int(block.sum())
        if 0 < new <= missing:
            block[:] = True
            return new
    return 0
