"""Batch-subset drop path (DINOv2): a residual branch runs on some rows of the batch only.

Which rows is a function of (seed, step, number of the crop in the global batch), so that a step is
the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cytoray.models.transfer import to_device

_STREAM = 21


@dataclass(frozen=True)
class DropRows:
    """Rows of a batch kept by each residual branch.

    Attributes:
        rows: per block (attention rows, MLP rows), int64 indices into the batch, ascending.
        scale: factor of a branch, (all rows / kept rows) of the global batch.
    """

    rows: Sequence[tuple[Tensor, Tensor]]
    scale: float


def kept_rows(
    seed: int, step: int, *, group: int, branches: int, total: int, rate: float
) -> np.ndarray:
    """Rows of the global batch that each branch keeps, a permutation of its own per branch.

    Args:
        seed: the run's seed.
        step: step of the run.
        group: which batch of crops (0 global, 1 local).
        branches: residual branches of the backbone, two a block.
        total: rows of the global batch.
        rate: share of the rows that is dropped, in [0, 1).

    Returns:
        int64 (branches, max(1, int(total * (1 - rate)))), ascending in each row.
    """
    kept = max(1, int(total * (1.0 - rate)))
    rng = np.random.default_rng((seed, step, _STREAM, group))
    order = rng.permuted(np.tile(np.arange(total), (branches, 1)), axis=1)
    return np.sort(order[:, :kept], axis=1)


def make_drop_rows(
    seed: int,
    step: int,
    *,
    group: int,
    depth: int,
    total: int,
    start: int,
    stop: int,
    rate: float,
    device: torch.device,
) -> DropRows | None:
    """The kept rows among [start, stop) of the global batch, counted from `start`.

    Returns:
        None when nothing is dropped.
    """
    if rate <= 0.0:
        return None
    kept = kept_rows(seed, step, group=group, branches=2 * depth, total=total, rate=rate)
    local = [row[(row >= start) & (row < stop)] - start for row in kept]
    flat = to_device(np.concatenate(local), device)
    parts = flat.split([len(row) for row in local])
    return DropRows(list(zip(parts[::2], parts[1::2], strict=True)), total / kept.shape[1])


def subset_block(
    block: Any, x: Tensor, attn_rows: Tensor, mlp_rows: Tensor, scale: float
) -> Tensor:
    """A pre-norm transformer block whose two branches see a subset of the batch each.

    x[r] += scale * branch(x[r]) for the rows r of that branch: the other rows cost nothing, and
    with scale = B / |r| the expectation over random rows is the plain block.

    Args:
        block: a timm block with norm1, attn, ls1, norm2, mlp, ls2.
        x: float (B, T, D).
        attn_rows: int64 indices of the rows kept by attention.
        mlp_rows: int64 indices of the rows kept by the MLP.
        scale: factor of both branches.
    """
    attended = block.ls1(block.attn(block.norm1(x.index_select(0, attn_rows))))
    x = x.index_add(0, attn_rows, attended.to(x.dtype), alpha=scale)
    transformed = block.ls2(block.mlp(block.norm2(x.index_select(0, mlp_rows))))
    return x.index_add(0, mlp_rows, transformed.to(x.dtype), alpha=scale)
