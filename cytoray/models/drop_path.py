"""Batch-subset drop path (DINOv2): a residual branch runs on some rows of the batch only.

Which rows is a function of (seed, step, number of the crop in the global batch), so that a step is
the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class KeptRows:
    """As `DropRows`, still on the host: per branch, int64 indices in an array."""

    rows: Sequence[np.ndarray]
    scale: float

    def to(self, device: torch.device) -> DropRows:
        """All rows in one transfer."""
        parts = to_device(np.concatenate(self.rows), device).split([len(r) for r in self.rows])
        return DropRows(list(zip(parts[::2], parts[1::2], strict=True)), self.scale)


def choose_drop_rows(
    seed: int,
    step: int,
    *,
    group: int,
    depth: int,
    total: int,
    start: int,
    stop: int,
    rate: float,
) -> KeptRows | None:
    """The kept rows among [start, stop) of the global batch, counted from `start`.

    Returns:
        None when nothing is dropped.
    """
    if rate <= 0.0:
        return None
    kept = kept_rows(seed, step, group=group, branches=2 * depth, total=total, rate=rate)
    own = [row[(row >= start) & (row < stop)] - start for row in kept]
    return KeptRows(own, total / kept.shape[1])
