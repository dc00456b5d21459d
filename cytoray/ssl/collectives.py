"""Sums, maxima and gathers over the ranks; without a process group each is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(x: Tensor) -> Tensor:
    """Sum of `x` over the ranks; `x` is overwritten. No gradient."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def all_max(x: Tensor) -> Tensor:
    """Elementwise maximum of `x` over the ranks; `x` is overwritten. No gradient."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


class RowGathering:
    """The rows of all ranks on their way, with gradient to this rank's own.

    What is computed between its making and `rows` hides the exchange, and the wait for a rank that
    is behind.

    A loss computed by every rank on the whole gathered matrix has, summed over the ranks, the
    gradient of the same loss on one rank, with no communication in the backward pass. Ranks may
    hold different numbers of rows.

    Args:
        x: (n, D), this rank's rows.
        total: rows of all ranks together.
        offset: position of this rank's first row.
    """

    def __init__(self, x: Tensor, *, total: int, offset: int) -> None:
        self._own, self._offset = x, offset
        self._everyone, self._work = x, None
        if world_size() > 1:
            self._everyone = x.new_zeros(total, x.shape[1])
            self._everyone[offset : offset + x.shape[0]] = x.detach()
            self._work = dist.all_reduce(self._everyone, op=dist.ReduceOp.SUM, async_op=True)

    def rows(self) -> Tensor:
        """(total, D); rows [offset, offset + n) are `x` itself."""
        if self._work is None:
            return self._own
        self._work.wait()
        end = self._offset + self._own.shape[0]
        return torch.cat([self._everyone[: self._offset], self._own, self._everyone[end:]])


def gather_rows(x: Tensor, *, total: int, offset: int) -> Tensor:
    """The rows of all ranks at once: see `RowGathering`."""
    return RowGathering(x, total=total, offset=offset).rows()
