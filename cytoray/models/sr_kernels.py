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


@triton.constexpr_function
def _begin(tiles, t):
    """Where the t-th tile of a row begins."""
    return sum(int(size) for size in tiles[: int(t)])


@triton.constexpr_function
def _tiles_with(tiles, count):
    """How many tiles, from the first, hold so many keys."""
    return next(t for t in range(1, len(tiles) + 1) if sum(int(s) for s in tiles[:t]) >= int(count))


@triton.jit
def _rows(base, rows, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a matrix of width D, with zeros up to WIDTH."""
    c = tl.arange(0, WIDTH)
    place = base + rows[:, None] * D + c[None, :]
    if WIDTH == D:
        return tl.load(place)
    return tl.load(place, mask=(c < D)[None, :], other=0.0)


@triton.jit
def _put(base, values, i, c, T: tl.constexpr, D: tl.constexpr):
    """Write rows i and columns c of a matrix (T, D), as far as they are within it."""
    inside = (i < T)[:, None] & (c < D)[None, :]
    place = base + i[:, None] * D + c[None, :]
    tl.store(place, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _bucket_tile(buckets, rows, j, T: tl.constexpr):
    return tl.load(buckets + rows[:, None] * T + j[None, :]).to(tl.int32)


@triton.jit
def _score_tile(
    q_tile, k, from_query, from_key, buckets, rows, j,
    T: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
    IRPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores before they are scaled, of some rows and keys j."""
    scores = tl.zeros((rows.shape[0], j.shape[0]), tl.float32)
    if IRPE:
        bucket = _bucket_tile(buckets, rows, j, T)
        scores = tl.load((from_query + rows * K)[:, None] + bucket).to(tl.float32)
        scores += tl.load((from_key + j * K)[None, :] + bucket).to(tl.float32)
    return tl.dot(q_tile, tl.trans(_rows(k, j, D, WIDTH)), scores, input_precision=PRECISION)


@triton.jit
def _slope_tile(
    grad_tile, mean, v, weights, from_value, buckets, rows, j, scale,
    T: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
    IRPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient for the scores before they are scaled, of some rows and keys j."""
    steep = tl.zeros((rows.shape[0], j.shape[0]), tl.float32)
    if IRPE:
        bucket = _bucket_tile(buckets, rows, j, T)
        steep = tl.load((from_value + rows * K)[:, None] + bucket).to(tl.float32)
    steep = tl.dot(grad_tile, tl.trans(_rows(v, j, D, WIDTH)), steep, input_precision=PRECISION)
    shares = tl.load(weights + rows[:, None] * T + j[None, :]).to(tl.float32)
    return shares * (steep * scale - (mean * scale)[:, None])


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
def _count(scores, bound, TILES: tl.constexpr):
    """How many of each row are at or above a bound."""
    below = tl.zeros_like(bound).to(tl.int32)
    for t in tl.static_range(len(TILES)):
        # The sign of a difference is a comparison that needs no predicate.
        apart = (scores[t] - bound[:, None]).to(tl.uint32, bitcast=True)
        below += tl.sum(apart >> 31, axis=1).to(tl.int32)
    return _begin(TILES, len(TILES)) - below


@triton.jit
def _largest_below(scores, bound, TILES: tl.constexpr):
    found = tl.full(bound.shape, -float("inf"), tl.float32)
    for t in tl.static_range(len(TILES)):
        lower = tl.where(scores[t] < bound[:, None], scores[t], -float("inf"))
        found = tl.maximum(found, tl.max(lower, axis=1))
    return found


@triton.jit
def _threshold(
    scores, lowest, highest, real,
    TILES: tl.constexpr, TOP_H: tl.constexpr, BY_VALUE: tl.constexpr,
):  # fmt: skip
    """The h-th largest of each row. Of rows that are not real, anything.

    At least h scores of a row are at or above `lowest`; `highest` is its largest.
    The interval around the threshold is halved until h scores lie at or above its lower end (the
    threshold is that end), or h - 1 at or above its upper end (it is the largest score below).
    Where several scores tie that never comes: after `BY_VALUE` rounds the integers of the same
    order are halved, of which there is one between the ends in the end.
    """
    low = lowest
    high = _value_of(tl.minimum(_key_of(highest), 0x7FFFFFFE) + 1)
    going = real
    is_above = real & (TOP_H < 0)  # no row yet
    unsettled, rounds = 1, 0
    while unsettled > 0:
        bound = 0.5 * low + 0.5 * high
        usable = (bound > low) & (bound < high)
        if rounds >= BY_VALUE:
            low_key, high_key = _key_of(low), _key_of(high)
            bound = _value_of((low_key >> 1) + (high_key >> 1) + (low_key & high_key & 1))
            usable = high_key > low_key + 1
            going = going & usable
        count = _count(scores, bound, TILES)
        moves = going & usable
        low = tl.where(moves & (count >= TOP_H), bound, low)
        high = tl.where(moves & (count < TOP_H), bound, high)
        is_above = is_above | (moves & (count == TOP_H - 1))
        going = going & ((usable & ((count == TOP_H) | (count == TOP_H - 1))) == 0)
        rounds += 1
        unsettled = tl.max(going.to(tl.int32), axis=0)
    return tl.where(is_above, _largest_below(scores, high, TILES), low)


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
    scale,
    TILES: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    IRPE: tl.constexpr,
    TOP_H: tl.constexpr,
    BY_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = _begin(TILES, len(TILES))
    LAST: tl.constexpr = len(TILES) - 1
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = i
    if T % ROWS != 0:
        rows = tl.minimum(i, T - 1)
    q += n * T * D
    k += n * T * D
    v += n * T * D
    from_query += n * T * K
    from_key += n * T * K
    q_tile = _rows(q, rows, D, WIDTH)
    scores = ()
    for t in tl.static_range(len(TILES)):
        j = _begin(TILES, t) + tl.arange(0, TILES[t])
        scores = scores + (
            _score_tile(
                q_tile, k, from_query, from_key, buckets, rows, j,
                T, D, WIDTH, K, IRPE, PRECISION,
            ),
        )  # fmt: skip
    lowest = tl.min(scores[0], axis=1)
    for t in tl.static_range(1, _tiles_with(TILES, TOP_H)):
        lowest = tl.minimum(lowest, tl.min(scores[t], axis=1))  # padding may lower it: no harm
    # The tokens' padding is in the last tile: a tile has 16 keys and more, the padding fewer.
    j = _begin(TILES, LAST) + tl.arange(0, TILES[LAST])
    scores = scores[:LAST] + (tl.where((j < tokens)[None, :], scores[LAST], -float("inf")),)
    highest = tl.max(scores[0], axis=1)
    for t in tl.static_range(1, len(TILES)):
        highest = tl.maximum(highest, tl.max(scores[t], axis=1))
    threshold = highest
    if TOP_H:
        threshold = _threshold(scores, lowest, highest, i < tokens, TILES, TOP_H, BY_VALUE)
    sharpness = scale * 1.4426950408889634  # exp(x) = 2^(x log2 e)
    total = tl.zeros_like(highest)
    shares = ()
    for t in tl.static_range(len(TILES)):
        # NaN stays, so that it is noticed.
        share = tl.exp2(scores[t] * sharpness - (highest * sharpness)[:, None])
        if TOP_H:
            share = tl.where(scores[t] < threshold[:, None], 0.0, share)
        total += tl.sum(share, axis=1)
        shares = shares + (share,)
    factor = tl.where(i < tokens, 1.0 / total, 0.0)[:, None]
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for t in tl.static_range(len(TILES)):
        j = _begin(TILES, t) + tl.arange(0, TILES[t])
        share = (shares[t] * factor).to(v.dtype.element_ty)
        _put(weights + n * T * T, share, i, j, T, T)
        mixed = tl.dot(share, _rows(v, j, D, WIDTH), mixed, input_precision=PRECISION)
    _put(out + n * T * D, mixed, i, tl.arange(0, WIDTH), T, D)


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
    scale,
    TILES: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    IRPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = _begin(TILES, len(TILES))
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = i
    if T % ROWS != 0:
        rows = tl.minimum(i, T - 1)
    k += n * T * D
    v += n * T * D
    grad_tile = _rows(grad + n * T * D, rows, D, WIDTH)
    out_tile = _rows(out + n * T * D, rows, D, WIDTH)
    mean = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    back = tl.zeros((ROWS, WIDTH), tl.float32)
    for t in tl.static_range(len(TILES)):
        j = _begin(TILES, t) + tl.arange(0, TILES[t])
        steep = _slope_tile(
            grad_tile, mean, v, weights + n * T * T, from_value + n * T * K, buckets, rows, j,
            scale, T, D, WIDTH, K, IRPE, PRECISION,
        ).to(k.dtype.element_ty)  # fmt: skip
        _put(slope + n * T * T, steep, i, j, T, T)
        _put(turned + n * T * T, tl.trans(steep), j, i, T, T)
        back = tl.dot(steep, _rows(k, j, D, WIDTH), back, input_precision=PRECISION)
    _put(grad_q + n * T * D, back, i, tl.arange(0, WIDTH), T, D)


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
        from_key: (n, T, K), products of the keys with r^Q.
        buckets: uint8 (T, T).
        tokens: how many of the T tokens there are.
        top_h: keys that each query keeps, at most `tokens`; None: all.
        scale: of the scores, above 0.

    Returns:
        (n, T, d), without r^V, and weights (n, T, T).
    """
    n, padded = v.shape[:2]
    out, weights = torch.empty_like(v), v.new_empty(n, padded, padded)
    some: Any = q  # a pointer that is not read
    _attend_kernel[_programs(v, _ATTEND)](
        *(q, k, v),
        *(some if x is None else x for x in (from_query, from_key, buckets)),
        *(out, weights, tokens, scale),
        TOP_H=top_h or 0,
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
        *(slope, turned, grad_q, scale),
        **_options(v, from_value, _SLOPES),
    )
    return slope, turned, grad_q


_TILE = 128  # keys of a tile at most: larger ones take too many registers at once
# Tokens up to which a program is of so many rows and warps, and of registers a thread at most (None:
# all there are); `benchmarks.sr_shapes` compares them.
Shape = tuple[int, int, int | None]
_ATTEND: dict[int, Shape] = {64: (16, 1, None), 208: (64, 4, 168), 512: (64, 4, None)}
_SLOPES: dict[int, Shape] = {64: (16, 1, None), 208: (64, 4, 168), 512: (64, 4, None)}


def _tiles(tokens: int) -> tuple[int, ...]:
    """Powers of two that make up a number of tokens (a multiple of 16), the largest first."""
    whole, rest = divmod(tokens, _TILE)
    return (_TILE,) * whole + tuple(size for size in (64, 32, 16) if rest & size)


def _shape(v: Tensor, shapes: dict[int, Shape]) -> Shape:
    """Of the programs for (n, T, d)."""
    return next(shape for limit, shape in shapes.items() if v.shape[1] <= limit)


def _programs(v: Tensor, shapes: dict[int, Shape]) -> tuple[int, int]:
    return triton.cdiv(v.shape[1], _shape(v, shapes)[0]), v.shape[0]


def _options(v: Tensor, table: Tensor | None, shapes: dict[int, Shape]) -> dict[str, Any]:
    """What a kernel is compiled for. float32 products are made in full, as the definition's."""
    rows, warps, registers = _shape(v, shapes)
    return {
        "TILES": _tiles(v.shape[1]),
        "D": v.shape[2],
        "WIDTH": max(16, triton.next_power_of_2(v.shape[2])),
        "K": 1 if table is None else table.numel() // (v.shape[0] * v.shape[1]),
        "ROWS": rows,
        "IRPE": table is not None,
        "PRECISION": "ieee",
        "num_warps": warps,
        "maxnreg": registers,
    }
