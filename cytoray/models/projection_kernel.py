# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (Triton reads the kernel, Python does not)
"""The Triton kernel of `cytoray.models.projection_parts`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _WARPS = 32, 128, 4  # of a program


@triton.jit
def _join_kernel(
    q,
    k,
    v,
    into,
    rows,
    tokens,
    q_crop,
    q_head,
    q_token,
    k_crop,
    k_head,
    k_token,
    v_crop,
    v_head,
    v_token,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < HEADS * D)[None, :]
    # In 64 bits: all numbers of a group may be more than 32 bits hold.
    crop = (row // tokens).to(tl.int64)[:, None]
    token = (row % tokens).to(tl.int64)[:, None]
    head, c = (column // D)[None, :], (column % D)[None, :]
    place = into + row.to(tl.int64)[:, None] * (3 * HEADS * D) + column[None, :]
    some = tl.load(q + crop * q_crop + token * q_token + (head * q_head + c), mask=inside)
    tl.store(place, some, mask=inside)
    some = tl.load(k + crop * k_crop + token * k_token + (head * k_head + c), mask=inside)
    tl.store(place + HEADS * D, some, mask=inside)
    some = tl.load(v + crop * v_crop + token * v_token + (head * v_head + c), mask=inside)
    tl.store(place + 2 * HEADS * D, some, mask=inside)


def join_group(q: Tensor, k: Tensor, v: Tensor, into: Tensor) -> None:
    """Copy three (n, H, T, d) to (n * T, 3 * H * d), in the order of a projection."""
    crops, heads, tokens, width = q.shape
    if not crops:
        return
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v)]
    rows = crops * tokens
    _join_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(heads * width, _COLUMNS))](
        *parts,
        *(into, rows, tokens),
        *(stride for part in parts for stride in part.stride()[:3]),
        HEADS=heads,
        D=width,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
    )
