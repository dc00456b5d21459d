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


def gather_rows(x: Tensor, *, total: int, offset: int) -> Tensor:
    """The rows of all ranks, with gradient to this rank's own.

    A loss computed by every rank on the whole gathered matrix has, summed over the ranks, the
    gradient of the same loss on one rank, with no communication in the backward pass. Ranks may
    hold different numbers of rows.

    Args:
        x: (n, D), this rank's rows.
        total: rows of all ranks together.
        offset: position of this rank's first row.

    Returns:
        (total, D); rows [offset, offset + n) are `x` itself.
    """
    if world_size() == 1:
        return x
    everyone = x.new_zeros(total, x.shape[1])
    everyone[offset : offset + x.shape[0]] = x.detach()
    all_sum(everyone)
    return torch.cat([everyone[:offset], x, everyone[offset + x.shape[0] :]])
