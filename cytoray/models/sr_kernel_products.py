# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (Triton reads the kernels, Python does not)
"""Products of SR-attention's gradients, where queries, keys and values lie: (B, N, 3, H, d).

A batched matrix product of PyTorch would first copy them into another order.
Shapes as in `cytoray.models.sr_kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cytoray.models.sr_kernels import head_options, place_of, put_rows, rows_of

# Rows a program takes at once, and its warps; `benchmarks.sr_shapes` compares them.
_KEYS = (64, 4)
_TABLES = (64, 4)
_BLOCKS = 32  # of rows, whose products a program adds up; the programs' are added up in the end


@triton.jit
def _key_kernel(
    turned,
    weights,
    qkv,
    grad,
    grad_qkv,
    crops,
    N: tl.constexpr,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    STRIDE: tl.constexpr = 3 * HEADS * D
    n, head, crop, j = place_of(crops, N, ROWS)
    qkv += crop * (N * STRIDE) + head * D
    grad += crop * (N * HEADS * D) + head * D
    grad_qkv += crop * (N * STRIDE) + head * D
    turned += n * T * T
    weights += n * T * T
    for_keys = tl.zeros((ROWS, WIDTH), tl.float32)
    for_values = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, T, ROWS):
        i = start + tl.arange(0, ROWS)
        rows = tl.minimum(i, N - 1)
        inside = (j < T)[:, None] & (i < T)[None, :]
        slope = tl.load(turned + j[:, None] * T + i[None, :], mask=inside, other=0.0)
        q_tile = rows_of(qkv, rows, STRIDE, D, WIDTH)
        for_keys = tl.dot(slope, q_tile, for_keys, input_precision=PRECISION)
        inside = (i < T)[:, None] & (j < T)[None, :]
        share = tl.load(weights + i[:, None] * T + j[None, :], mask=inside, other=0.0)
        grad_tile = rows_of(grad, rows, HEADS * D, D, WIDTH)
        for_values = tl.dot(tl.trans(share), grad_tile, for_values, input_precision=PRECISION)
    put_rows(grad_qkv + HEADS * D, for_keys, j, N, STRIDE, D)
    put_rows(grad_qkv + 2 * HEADS * D, for_values, j, N, STRIDE, D)


@triton.jit
def _table_kernel(
    sums,
    vectors,
    table,
    made,
    parts,
    rows,
    STRIDE: tl.constexpr,
    ADDS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part, head, kind = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    buckets = tl.arange(0, K)
    sums += (kind * HEADS + head).to(tl.int64) * rows * K
    vectors += (kind * HEADS + head) * D
    made += (kind * HEADS + head) * D
    table += (kind * HEADS + head if PER_HEAD else kind) * (K * D)
    table_tile = rows_of(table, buckets, D, D, WIDTH)
    total = tl.zeros((K, WIDTH), tl.float32)
    for block in range(BLOCKS):
        # In 64 bits: all crops' numbers may be more than 32 bits hold.
        i = (part * BLOCKS + block) * ROWS + tl.arange(0, ROWS).to(tl.int64)
        row = tl.minimum(i, rows - 1)
        place = sums + row[:, None] * K + buckets[None, :]
        some = tl.load(place, mask=(i < rows)[:, None], other=0.0)
        tile = rows_of(vectors, row, STRIDE, D, WIDTH)
        total = tl.dot(tl.trans(some), tile, total, input_precision=PRECISION)
        if ADDS:
            before = rows_of(made, row, STRIDE, D, WIDTH).to(tl.float32)
            after = tl.dot(some, table_tile, before, input_precision=PRECISION)
            put_rows(made, after, i, rows, STRIDE, D)
    parts += ((kind * HEADS + head) * tl.num_programs(0) + part).to(tl.int64) * (K * D)
    put_rows(parts, total, buckets, K, D, D)


def add_key_gradients(
    turned: Tensor, weights: Tensor, qkv: Tensor, grad: Tensor, grad_qkv: Tensor
) -> None:
    """Write the gradients of keys and values, without relative positions.

    Args:
        turned: (n, T, T) by key and query, of `cytoray.models.sr_kernels.slopes`.
        weights: (n, T, T).
        qkv: (B, N, 3, H, d), contiguous.
        grad: (B, N, H, d), contiguous, for the output.
        grad_qkv: (B, N, 3, H, d); the parts of keys and values are written.
    """
    crops, tokens, _, heads, _ = qkv.shape
    rows, warps = _KEYS
    _key_kernel[(triton.cdiv(tokens, rows) * crops * heads,)](
        *(turned, weights, qkv, grad, grad_qkv, crops),
        T=weights.shape[1],
        ROWS=rows,
        num_warps=warps,
        **head_options(qkv),
    )


def table_gradients(
    sums: Tensor, vectors: Tensor, tables: Tensor, made: Tensor | None = None
) -> Tensor:
    """Sums over all tokens of sums^T vectors; and made += sums @ table, in the same pass.

    Args:
        sums: (kinds, n, N, K), contiguous.
        vectors: (B, N, kinds or more, H, d), contiguous; those of the first kinds are met.
        tables: (kinds, K, d) or (kinds, H, K, d), contiguous.
        made: shaped as `vectors`; None: nothing is added to.

    Returns:
        As `tables`, float32.
    """
    kinds, _, _, buckets = sums.shape
    crops, tokens, together, heads, width = vectors.shape
    rows = crops * tokens
    at_once, warps = _TABLES
    num_parts = triton.cdiv(rows, at_once * _BLOCKS)
    parts = sums.new_empty(kinds, heads, num_parts, buckets, width, dtype=torch.float32)
    some: Any = vectors
    _table_kernel[(num_parts, heads, kinds)](
        *(sums, vectors, tables, some if made is None else made, parts, rows),
        STRIDE=together * heads * width,
        ADDS=made is not None,
        PER_HEAD=tables.dim() == 4,
        K=buckets,
        ROWS=at_once,
        BLOCKS=_BLOCKS,
        num_warps=warps,
        **{name: value for name, value in head_options(vectors).items() if name != "N"},
    )
    return parts.sum(2 if tables.dim() == 4 else (1, 2))
