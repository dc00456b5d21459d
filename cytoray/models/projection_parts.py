"""Queries, keys and values of several groups of crops, as views of one projection of all tokens.

Their gradients are put together in one pass: autograd would stack and join them, which in compiled
code is one expression that looks at every part for every number.
Shapes: groups of n crops of T tokens, N rows in all, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

Sizes = Sequence[tuple[int, int]]  # (crops n, tokens T) of each group, in their order
_HAS_TRITON = find_spec("triton") is not None  # asked once: in a block it would cut compiled code


def projection_parts(rows: Tensor, sizes: Sizes, heads: int) -> list[tuple[Tensor, ...]]:
    """Queries, keys and values of each group.

    Args:
        rows: (N, 3 H d), projections of the tokens of all groups, one group after the other.
        sizes: of the groups.
        heads: H.

    Returns:
        For each group three views (n, H, T, d).
    """
    if _joins(rows):
        parts = cast(Any, _Parts).apply(rows, sizes, heads)
    else:
        parts = _views(rows, sizes, heads)
    return [tuple(parts[start : start + 3]) for start in range(0, len(parts), 3)]


def _joins(rows: Tensor) -> bool:
    """Whether gradients are joined by the kernel."""
    return rows.device.type == "cuda" and _HAS_TRITON


def _views(rows: Tensor, sizes: Sizes, heads: int) -> tuple[Tensor, ...]:
    groups = rows.split([crops * tokens for crops, tokens in sizes])
    shape = (3, heads, rows.shape[1] // (3 * heads))
    return tuple(
        part
        for group, size in zip(groups, sizes, strict=True)
        for part in group.view(*size, *shape).permute(2, 0, 3, 1, 4).unbind(0)
    )


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sizes, heads: int) -> tuple[Tensor, ...]:
        return _views(rows, sizes, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return join_gradients(list(grads)), None, None


@torch.library.custom_op("cytoray::join_gradients", mutates_args=())
def join_gradients(grads: list[Tensor]) -> Tensor:
    """Gradients of `projection_parts`, three (n, H, T, d) a group, as one of rows (N, 3 H d)."""
    from cytoray.models.projection_kernel import join_group

    heads, width = grads[0].shape[1], grads[0].shape[3]
    sizes = [grad.shape[0] * grad.shape[2] for grad in grads[::3]]
    rows = grads[0].new_empty(sum(sizes), 3 * heads * width)
    with torch.cuda.device_of(rows):
        for group, into in enumerate(rows.split(sizes)):
            q, k, v = grads[3 * group : 3 * group + 3]
            join_group(q, k, v, into)
    return rows


@join_gradients.register_fake
def _(grads: list[Tensor]) -> Tensor:
    rows = sum(grad.shape[0] * grad.shape[2] for grad in grads[::3])
    return grads[0].new_empty(rows, 3 * grads[0].shape[1] * grads[0].shape[3])
