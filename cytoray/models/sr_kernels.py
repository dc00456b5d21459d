# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (Triton reads the kernels, Python does not)
"""SR-attention in two Triton kernels: a program holds some rows of scores whole, on the chip.

The scores, the threshold of each row and the softmax are never written to memory; the weights are,
once, in the type of `v`. Sums over the pairs of a bucket are left to matrix products, so nothing is
added atomically and a step can be repeated bit by bit.
Shapes: n batch times heads, T tokens (a multiple of 16, see `padded_tokens`; those past `tokens`
are zero and stay so), d width of a head, K buckets (padded as well).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROUNDS_BY_VALUE = 16  # of scores spread as a normal distribution, all of 64 rows need about 10


@triton.jit
def _tile(base, rows, columns, row_stride, row_count, column_count):
    """Rows and columns of a matrix, zero beyond its ends."""
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _put(base, values, rows, columns, row_stride, row_count, column_count):
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    place = base + rows[:, None] * row_stride + columns[None, :]
    tl.store(place, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _read_buckets(buckets, i, j, padded):
    inside = (i[:, None] < padded) & (j[None, :] < padded)
    return tl.load(buckets + i[:, None] * padded + j[None, :], mask=inside, other=0).to(tl.int32)


@triton.jit
def _scores(
    q_tile, k, from_query, from_key, buckets, i, j, c, padded, width,
    K: tl.constexpr, IRPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores before they are scaled, of rows i and keys j; those of padding are of no use."""
    scores = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    if IRPE:
        bucket = _read_buckets(buckets, i, j, padded)
        rows = tl.minimum(i, padded - 1)
        columns = tl.minimum(j, padded - 1)
        scores = tl.load(from_query + (rows[:, None] * K + bucket)).to(tl.float32)
        scores += tl.load(from_key + (bucket * padded + columns[None, :])).to(tl.float32)
    k_tile = _tile(k, j, c, width, padded, width)
    return tl.dot(q_tile, tl.trans(k_tile), scores, input_precision=PRECISION)


@triton.jit
def _slopes(
    grad_tile, mean, v, weights, from_value, buckets, i, j, c, padded, width, scale,
    K: tl.constexpr, IRPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient for the scores before they are scaled, of rows i and keys j."""
    steep = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    if IRPE:
        bucket = _read_buckets(buckets, i, j, padded)
        rows = tl.minimum(i, padded - 1)
        steep = tl.load(from_value + (rows[:, None] * K + bucket)).to(tl.float32)
    v_tile = _tile(v, j, c, width, padded, width)
    steep = tl.dot(grad_tile, tl.trans(v_tile), steep, input_precision=PRECISION)
    shares = _tile(weights, i, j, padded, padded, padded)
    return shares.to(tl.float32) * (steep * scale - (mean * scale)[:, None])


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
def _count(scores, tail, bound, TAIL: tl.constexpr):
    """How many of each row are at or above a bound."""
    # The sign of a difference is a comparison that needs no predicate.
    apart = (scores - bound[:, None]).to(tl.uint32, bitcast=True)
    count = scores.shape[1] - tl.sum(apart >> 31, axis=1).to(tl.int32)
    if TAIL:
        apart = (tail - bound[:, None]).to(tl.uint32, bitcast=True)
        count += TAIL - tl.sum(apart >> 31, axis=1).to(tl.int32)
    return count


@triton.jit
def _largest_below(scores, bound):
    return tl.max(tl.where(scores < bound[:, None], scores, -float("inf")), axis=1)


@triton.jit
def _threshold(
    scores, tail, lowest, highest, top_h, real, BY_VALUE: tl.constexpr, TAIL: tl.constexpr
):
    """The h-th largest of each row. Of rows that are not real, anything.

    `lowest` is at most the least of a row, `highest` its largest score.
    The interval around the threshold is halved until h scores lie at or above its lower end (the
    threshold is that end), or h - 1 at or above its upper end (it is the largest score below).
    Where several scores tie that never comes: after `BY_VALUE` rounds the integers of the same
    order are halved, of which there is one between the ends in the end.
    """
    low = lowest
    high = _value_of(tl.minimum(_key_of(highest), 0x7FFFFFFE) + 1)
    going = real
    is_above = real & (top_h < 0)  # no row yet
    unsettled, rounds = 1, 0
    while unsettled > 0:
        bound = 0.5 * low + 0.5 * high
        usable = (bound > low) & (bound < high)
        if rounds >= BY_VALUE:
            low_key, high_key = _key_of(low), _key_of(high)
            bound = _value_of((low_key >> 1) + (high_key >> 1) + (low_key & high_key & 1))
            usable = high_key > low_key + 1
            going = going & usable
        count = _count(scores, tail, bound, TAIL)
        moves = going & usable
        low = tl.where(moves & (count >= top_h), bound, low)
        high = tl.where(moves & (count < top_h), bound, high)
        is_above = is_above | (moves & (count == top_h - 1))
        going = going & ((usable & ((count == top_h) | (count == top_h - 1))) == 0)
        rounds += 1
        unsettled = tl.max(going.to(tl.int32), axis=0)
    below = _largest_below(scores, high)
    if TAIL:
        below = tl.maximum(below, _largest_below(tail, high))
    return tl.where(is_above, below, low)


@triton.jit
def _shares(scores, threshold, highest, sharpness, SPARSE: tl.constexpr):
    """exp(scores - highest), scaled; 0 below the threshold. NaN stays, so that it is noticed."""
    if SPARSE:
        scores = tl.where(scores < threshold[:, None], -float("inf"), scores)
    return tl.exp2(scores * sharpness - (highest * sharpness)[:, None])


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
    padded,
    width,
    scale,
    top_h,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
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
    start = n * padded * width
    table = n * padded * K
    q_tile = _tile(q + start, i, c, width, padded, width)
    scores = _scores(
        q_tile, k + start, from_query + table, from_key + table, buckets, i, j, c,
        padded, width, K, IRPE, PRECISION,
    )  # fmt: skip
    lowest = tl.min(scores, axis=1)  # padding may lower it, which costs a round at most
    scores = tl.where(j[None, :] < tokens, scores, -float("inf"))
    highest = tl.max(scores, axis=1)
    tail = scores
    if TAIL:
        j_tail = KEYS + tl.arange(0, TAIL)
        tail = _scores(
            q_tile, k + start, from_query + table, from_key + table, buckets, i, j_tail, c,
            padded, width, K, IRPE, PRECISION,
        )  # fmt: skip
        lowest = tl.minimum(lowest, tl.min(tail, axis=1))
        tail = tl.where(j_tail[None, :] < tokens, tail, -float("inf"))
        highest = tl.maximum(highest, tl.max(tail, axis=1))
    threshold = highest
    if SPARSE:
        threshold = _threshold(scores, tail, lowest, highest, top_h, i < tokens, BY_VALUE, TAIL)
    sharpness = scale * 1.4426950408889634  # exp(x) = 2^(x log2 e)
    shares = _shares(scores, threshold, highest, sharpness, SPARSE)
    total = tl.sum(shares, axis=1)
    if TAIL:
        tail = _shares(tail, threshold, highest, sharpness, SPARSE)
        total += tl.sum(tail, axis=1)
    factor = tl.where(i < tokens, 1.0 / total, 0.0)[:, None]
    some = (shares * factor).to(v.dtype.element_ty)
    pairs = weights + n * padded * padded
    _put(pairs, some, i, j, padded, padded, padded)
    v_tile = _tile(v + start, j, c, width, padded, width)
    mixed = tl.dot(some, v_tile, input_precision=PRECISION)
    if TAIL:
        j_tail = KEYS + tl.arange(0, TAIL)
        rest = (tail * factor).to(v.dtype.element_ty)
        _put(pairs, rest, i, j_tail, padded, padded, padded)
        v_tail = _tile(v + start, j_tail, c, width, padded, width)
        mixed = tl.dot(rest, v_tail, mixed, input_precision=PRECISION)
    _put(out + start, mixed, i, c, width, padded, width)


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
    turned,
    grad_q,
    padded,
    width,
    scale,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    IRPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, KEYS)
    c = tl.arange(0, WIDTH)
    start = n * padded * width
    pairs = n * padded * padded
    values = from_value + n * padded * K
    grad_tile = _tile(grad + start, i, c, width, padded, width)
    out_tile = _tile(out + start, i, c, width, padded, width)
    mean = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    steep = _slopes(
        grad_tile, mean, v + start, weights + pairs, values, buckets, i, j, c,
        padded, width, scale, K, IRPE, PRECISION,
    ).to(k.dtype.element_ty)  # fmt: skip
    _put(slope + pairs, steep, i, j, padded, padded, padded)
    _put(turned + pairs, tl.trans(steep), j, i, padded, padded, padded)
    k_tile = _tile(k + start, j, c, width, padded, width)
    back = tl.dot(steep, k_tile, input_precision=PRECISION)
    if TAIL:
        j_tail = KEYS + tl.arange(0, TAIL)
        rest = _slopes(
            grad_tile, mean, v + start, weights + pairs, values, buckets, i, j_tail, c,
            padded, width, scale, K, IRPE, PRECISION,
        ).to(k.dtype.element_ty)  # fmt: skip
        _put(slope + pairs, rest, i, j_tail, padded, padded, padded)
        _put(turned + pairs, tl.trans(rest), j_tail, i, padded, padded, padded)
        k_tail = _tile(k + start, j_tail, c, width, padded, width)
        back = tl.dot(rest, k_tail, back, input_precision=PRECISION)
    _put(grad_q + start, back, i, c, width, padded, width)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    from_query: Tensor | None,
    from_key: Tensor | None,
    buckets: Tensor | None,
    *,
    tokens: int,
    top_h: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Weights of every pair, and the values they mix.

    Args:
        q: (n, T, d), contiguous, as `k` and `v` of one type.
        k: (n, T, d).
        v: (n, T, d).
        from_query: (n, T, K), products of the queries with r^K; None: no positions.
        from_key: (n, K, T), products of r^Q with the keys.
        buckets: uint8 (T, T).
        tokens: how many of the T tokens there are.
        top_h: keys that each query keeps, at most `tokens`; None: all.
        scale: of the scores, above 0.

    Returns:
        (n, T, d), without r^V, and weights (n, T, T).
    """
    n, padded, width = v.shape
    out, weights = torch.empty_like(v), v.new_empty(n, padded, padded)
    some: Any = q  # a pointer that is not read
    _attend_kernel[_programs(v, _ATTEND)](
        *(q, k, v),
        *(some if x is None else x for x in (from_query, from_key, buckets)),
        *(out, weights, tokens, padded, width, scale, top_h or 0),
        SPARSE=top_h is not None,
        BY_VALUE=_ROUNDS_BY_VALUE,
        **_options(v, from_query, _ATTEND),
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
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient for the products that the scores are scaled from, and its product with the keys.

    Args:
        grad: (n, T, d), contiguous, for the output.
        out: (n, T, d), the output with the part of r^V.
        k: as in `attend`.
        v: as in `attend`.
        weights: (n, T, T) of `attend`.
        from_value: (n, T, K), products of `grad` with r^V; None: no positions.
        buckets: as in `attend`.
        scale: of the scores.

    Returns:
        (n, T, T) by query and key, the same by key and query, and (n, T, d).
    """
    slope, turned, grad_q = (torch.empty_like(x) for x in (weights, weights, v))
    some: Any = v
    _slope_kernel[_programs(v, _SLOPES)](
        *(grad, out, k, v, weights),
        *(some if x is None else x for x in (from_value, buckets)),
        *(slope, turned, grad_q, v.shape[1], v.shape[2], scale),
        **_options(v, from_value, _SLOPES),
    )
    return slope, turned, grad_q


# Keys a program holds -> rows it works on, and its warps; `benchmarks.sr_shapes` compares them.
_ATTEND = {288: (64, 4), 512: (16, 4)}
_SLOPES = {128: (16, 4), 288: (32, 4), 512: (16, 4)}


def _keys(tokens: int) -> tuple[int, int]:
    """Tiles that hold the keys of a row: one of a power of two, and another (or 0) for the rest."""
    whole = max(16, triton.next_power_of_2(tokens))
    part = whole // 2
    rest = triton.next_power_of_2(tokens - part) if part >= 16 else whole
    return (part, rest) if part + rest < whole else (whole, 0)


def _shape(v: Tensor, shapes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Rows and warps of a program."""
    keys = sum(_keys(v.shape[1]))
    return next(shape for limit, shape in shapes.items() if keys <= limit)


def _programs(v: Tensor, shapes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    return triton.cdiv(v.shape[1], _shape(v, shapes)[0]), v.shape[0]


def _options(v: Tensor, table: Tensor | None, shapes: dict[int, tuple[int, int]]) -> dict[str, Any]:
    """What a kernel is compiled for. float32 products are made in full, as the definition's."""
    (keys, tail), (rows, warps) = _keys(v.shape[1]), _shape(v, shapes)
    return {
        "K": 1 if table is None else table.numel() // (v.shape[0] * v.shape[1]),
        "ROWS": rows,
        "KEYS": keys,
        "TAIL": tail,
        "WIDTH": max(16, triton.next_power_of_2(v.shape[2])),
        "IRPE": table is not None,
        "PRECISION": "ieee",
        "num_warps": warps,
    }
