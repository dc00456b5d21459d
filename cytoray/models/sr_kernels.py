# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (Triton reads the kernels, Python does not)
"""SR-attention in two Triton kernels: a program holds some rows of scores whole, on the chip.

The scores, the threshold of each row and the softmax are never written to memory; the weights are,
once, in the type of `v`. Sums over the pairs of a bucket are left to matrix products, so nothing is
added atomically and a step can be repeated bit by bit.
Shapes: n batch times heads, N tokens, d width of a head, K buckets.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cytoray.models.sr_ops import KERNEL_TOKENS, empty_pairs

_ROUNDS_BY_VALUE = 16  # of scores spread as a normal distribution, all of 32 rows need 12 or 13


@triton.jit
def _tile(base, rows, columns, row_stride, row_count, column_count):
    """Rows and columns of a matrix, zero beyond its ends."""
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _read_buckets(buckets, i, j, tokens):
    """Bucket of each pair, and which pairs there are; small numbers, for there are many."""
    inside = (i[:, None] < tokens) & (j[None, :] < tokens)
    bucket = tl.load(buckets + i[:, None] * tokens + j[None, :], mask=inside, other=0)
    return bucket.to(tl.int32), inside


@triton.jit
def _put(base, values, rows, columns, row_stride, row_count, column_count):
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    place = base + rows[:, None] * row_stride + columns[None, :]
    tl.store(place, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _key_of(values):
    """Integers in the order of the floats; zero and negative zero are one."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value_of(keys):
    bits = tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _keep_largest(scores, top_h, real, BY_VALUE: tl.constexpr):
    """-inf below the h-th largest of each row; ties and NaN stay. Rows that are not real pass.

    Floats are compared as integers of the same order, whose interval is halved until exactly h lie
    above its lower end, or until it is a single value at which several tie. The first `BY_VALUE`
    rounds halve between the values: integers are as dense around 0 as the whole rest, scores not.
    """
    keys = _key_of(scores)
    low = tl.min(keys, axis=1)
    high = tl.minimum(tl.max(keys, axis=1), 0x7FFFFFFE) + 1
    high = tl.where(real, high, low + 1)
    unsettled, rounds = 1, 0
    while unsettled > 0:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        halfway = _key_of(0.5 * _value_of(low) + 0.5 * _value_of(high))
        usable = (halfway > low) & (halfway < high) & (rounds < BY_VALUE)
        middle = tl.where(usable, halfway, middle)
        rounds += 1
        count = tl.sum((keys >= middle[:, None]).to(tl.int32), axis=1)
        low = tl.where(count >= top_h, middle, low)
        high = tl.where(count > top_h, high, tl.where(count == top_h, middle + 1, middle))
        high = tl.where(real, tl.maximum(high, low + 1), low + 1)
        unsettled = tl.max((high > low + 1).to(tl.int32), axis=0)
    kept = (keys >= low[:, None]) | (scores != scores)
    return tl.where(kept, scores, -float("inf"))


@triton.jit
def _attend_kernel(
    q,
    k,
    v,
    from_query,
    from_key,
    buckets,
    out,
    weights,
    tokens,
    width,
    weights_stride,
    top_h,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    IRPE: tl.constexpr,
    SPARSE: tl.constexpr,
    BY_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, KEYS)
    c = tl.arange(0, WIDTH)
    start = n * tokens * width
    q_tile = _tile(q + start, i, c, width, tokens, width)
    k_tile = _tile(k + start, j, c, width, tokens, width)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    if IRPE:
        bucket, inside = _read_buckets(buckets, i, j, tokens)
        table = n * tokens * K
        place = i[:, None] * K + bucket
        scores += tl.load(from_query + table + place, mask=inside, other=0.0).to(tl.float32)
        place = bucket * tokens + j[None, :]
        scores += tl.load(from_key + table + place, mask=inside, other=0.0).to(tl.float32)
    scores = tl.where(j[None, :] < tokens, scores, -float("inf"))
    if SPARSE:
        scores = _keep_largest(scores, top_h, i < tokens, BY_VALUE)
    shares = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    shares = (shares / tl.sum(shares, axis=1)[:, None]).to(v.dtype.element_ty)
    rows = n * tokens * weights_stride
    _put(weights + rows, shares, i, j, weights_stride, tokens, tokens)
    v_tile = _tile(v + start, j, c, width, tokens, width)
    mixed = tl.dot(shares, v_tile, input_precision=PRECISION)
    _put(out + start, mixed, i, c, width, tokens, width)


@triton.jit
def _slope_kernel(
    grad,
    out,
    k,
    v,
    weights,
    from_value,
    buckets,
    slope,
    grad_q,
    tokens,
    width,
    weights_stride,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    IRPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, KEYS)
    c = tl.arange(0, WIDTH)
    start = n * tokens * width
    rows = n * tokens * weights_stride
    grad_tile = _tile(grad + start, i, c, width, tokens, width)
    out_tile = _tile(out + start, i, c, width, tokens, width)
    v_tile = _tile(v + start, j, c, width, tokens, width)
    steep = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
    if IRPE:
        bucket, inside = _read_buckets(buckets, i, j, tokens)
        place = i[:, None] * K + bucket
        steep += tl.load(from_value + n * tokens * K + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    shares = _tile(weights + rows, i, j, weights_stride, tokens, tokens)
    steep = (shares.to(tl.float32) * (steep - mean[:, None])).to(k.dtype.element_ty)
    _put(slope + rows, steep, i, j, weights_stride, tokens, tokens)
    k_tile = _tile(k + start, j, c, width, tokens, width)
    _put(
        grad_q + start,
        tl.dot(steep, k_tile, input_precision=PRECISION),
        i,
        c,
        width,
        tokens,
        width,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    from_query: Tensor | None,
    from_key: Tensor | None,
    buckets: Tensor | None,
    top_h: int | None,
) -> tuple[Tensor, Tensor]:
    """Weights of every pair, and the values they mix.

    Args:
        q: (n, N, d), contiguous and scaled, as `k` and `v` of one type.
        k: (n, N, d).
        v: (n, N, d).
        from_query: (n, N, K), products of the queries with r^K; None: no positions.
        from_key: (n, K, N), products of r^Q with the keys.
        buckets: integer (N, N).
        top_h: keys that each query keeps, at most N; None: all.

    Returns:
        (n, N, d), without r^V, and weights (n, N, N) whose rows are padded in memory.
    """
    out, weights = torch.empty_like(v), empty_pairs(v)
    some: Any = q  # a pointer that is not read
    _attend_kernel[_programs(v)](
        *(q, k, v),
        *(some if x is None else x for x in (from_query, from_key, buckets)),
        *(out, weights),
        *(v.shape[1], v.shape[2], weights.stride(1), top_h or 0),
        SPARSE=top_h is not None,
        BY_VALUE=_ROUNDS_BY_VALUE,
        **_options(v, from_query),
    )
    return out, weights


def slopes(
    grad: Tensor,
    out: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    from_value: Tensor | None,
    buckets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradient for the scores, and its product with the keys.

    Args:
        grad: (n, N, d), contiguous, for the output.
        out: (n, N, d), the output with the part of r^V.
        k: as in `attend`.
        v: as in `attend`.
        weights: (n, N, N) of `attend`.
        from_value: (n, N, K), products of `grad` with r^V; None: no positions.
        buckets: as in `attend`.

    Returns:
        (n, N, N), rows padded in memory, and (n, N, d).
    """
    slope, grad_q = empty_pairs(v), torch.empty_like(v)
    some: Any = v
    _slope_kernel[_programs(v)](
        *(grad, out, k, v, weights),
        *(some if x is None else x for x in (from_value, buckets)),
        *(slope, grad_q),
        *(v.shape[1], v.shape[2], weights.stride(1)),
        **_options(v, from_value),
    )
    return slope, grad_q


def _rows(tokens: int) -> int:
    return 32 if tokens <= KERNEL_TOKENS // 2 else 16


def _programs(v: Tensor) -> tuple[int, int]:
    n, tokens = v.shape[:2]
    return triton.cdiv(tokens, _rows(tokens)), n


def _options(v: Tensor, table: Tensor | None) -> dict[str, Any]:
    """What a kernel is compiled for. float32 products are made in full, as the definition's."""
    tokens, width = v.shape[1:]
    buckets = 1 if table is None else table.numel() // (v.shape[0] * tokens)
    return {
        "K": buckets,
        "ROWS": _rows(tokens),
        "KEYS": max(16, triton.next_power_of_2(tokens)),
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "IRPE": table is not None,
        "PRECISION": "ieee",
        "num_warps": 8,
    }
