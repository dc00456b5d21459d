# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# ruff: noqa: RUF005
# (Triton reads the kernels, Python does not; it has no unpacking of tuples)
"""SR-attention in two Triton kernels: a program holds some rows of scores whole, on the chip.

The scores, the threshold of each row and the softmax are never written to memory; the weights are,
once, in the type of `qkv`. Sums over the pairs of a bucket are left to matrix products, so nothing
is added atomically and a step can be repeated bit by bit.
Shapes: B crops, H heads, n = H * B (all crops of a head follow each other), N tokens, T those and
what pads them to whole 16, d width of a head, K buckets (padded as well). Queries, keys and values
come as the projection makes them, (B, N, 3, H, d), and nothing is copied to be in another order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cytoray.models.irpe import padded_tokens
from cytoray.models.sr_kernel_threshold import begin, find_threshold

_ROUNDS_BY_VALUE = 16  # of scores spread as a normal distribution, all of 64 rows need about 10


@triton.constexpr_function
def _tiles_with(tiles, count):
    """How many tiles, from the first, hold so many keys."""
    return next(t for t in range(1, len(tiles) + 1) if sum(int(s) for s in tiles[:t]) >= int(count))


@triton.jit
def place_of(crops, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """What the program works on: the n-th attention, its head and crop, and some of COUNT rows."""
    blocks = tl.cdiv(COUNT, ROWS)
    n = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    # In 64 bits where it is multiplied: all numbers may be more than 32 bits hold.
    return n.to(tl.int64), n // crops, (n % crops).to(tl.int64), i


@triton.jit
def rows_of(base, rows, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of width D, with zeros up to WIDTH."""
    c = tl.arange(0, WIDTH)
    place = base + rows[:, None] * STRIDE + c[None, :]
    if WIDTH == D:
        return tl.load(place)
    return tl.load(place, mask=(c < D)[None, :], other=0.0)


@triton.jit
def put_rows(base, values, i, end, STRIDE: tl.constexpr, D: tl.constexpr):
    """Write rows i of width D, those before `end`."""
    c = tl.arange(0, values.shape[1])
    inside = (i < end)[:, None] & (c < D)[None, :]
    place = base + i[:, None] * STRIDE + c[None, :]
    tl.store(place, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _put_pairs(base, values, i, j, T: tl.constexpr):
    """Write pairs of rows i and columns j, those of T tokens."""
    inside = (i < T)[:, None] & (j < T)[None, :]
    tl.store(base + i[:, None] * T + j[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _bucket_tile(buckets, rows, j, T: tl.constexpr):
    return tl.load(buckets + rows[:, None] * T + j[None, :]).to(tl.int32)


@triton.jit
def _score_tile(
    q_tile, k, from_query, from_key, buckets, rows, j,
    N: tl.constexpr, T: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, IRPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores before they are scaled, of some rows and keys j; those of padding are of no use."""
    columns = tl.minimum(j, N - 1)
    scores = tl.zeros((rows.shape[0], j.shape[0]), tl.float32)
    if IRPE:
        bucket = _bucket_tile(buckets, rows, j, T)
        scores = tl.load((from_query + rows * K)[:, None] + bucket).to(tl.float32)
        scores += tl.load((from_key + columns * K)[None, :] + bucket).to(tl.float32)
    k_tile = rows_of(k, columns, STRIDE, D, WIDTH)
    return tl.dot(q_tile, tl.trans(k_tile), scores, input_precision=PRECISION)


@triton.jit
def _slope_tile(
    grad_tile, mean, v, weights, from_value, buckets, i, rows, j, scale,
    N: tl.constexpr, T: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, IRPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient for the scores before they are scaled, of rows i and keys j; 0 of padding."""
    steep = tl.zeros((rows.shape[0], j.shape[0]), tl.float32)
    if IRPE:
        bucket = _bucket_tile(buckets, rows, j, T)
        steep = tl.load((from_value + rows * K)[:, None] + bucket).to(tl.float32)
    v_tile = rows_of(v, tl.minimum(j, N - 1), STRIDE, D, WIDTH)
    steep = tl.dot(grad_tile, tl.trans(v_tile), steep, input_precision=PRECISION)
    place = weights + rows[:, None] * T + j[None, :]
    shares = tl.load(place, mask=(i < N)[:, None], other=0.0).to(tl.float32)
    return shares * (steep * scale - (mean * scale)[:, None])


@triton.jit
def _meet_table(
    tile, table, products, i, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the products of rows i with a table (K, D); the program may read them from now on."""
    table_tile = rows_of(table, tl.arange(0, K), D, D, WIDTH)
    made = tl.dot(tile, tl.trans(table_tile), input_precision=PRECISION)
    put_rows(products, made, i, N, K, K)
    tl.debug_barrier()


@triton.jit
def _attend_kernel(
    qkv,
    r_k,
    from_query,
    from_key,
    buckets,
    out,
    weights,
    crops,
    scale,
    N: tl.constexpr,
    TILES: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    IRPE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    TOP_H: tl.constexpr,
    BY_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = begin(TILES, len(TILES))
    LAST: tl.constexpr = len(TILES) - 1
    STRIDE: tl.constexpr = 3 * HEADS * D
    n, head, crop, i = place_of(crops, T, ROWS)
    rows = tl.minimum(i, N - 1)
    qkv += crop * (N * STRIDE) + head * D
    q_tile = rows_of(qkv, rows, STRIDE, D, WIDTH)
    from_query += n * N * K
    if IRPE:
        r_k += head * (K * D) if PER_HEAD else 0
        _meet_table(q_tile, r_k, from_query, i, N, D, WIDTH, K, PRECISION)
    scores = ()
    for t in tl.static_range(len(TILES)):
        j = begin(TILES, t) + tl.arange(0, TILES[t])
        scores = scores + (
            _score_tile(
                q_tile, qkv + HEADS * D, from_query, from_key + n * N * K, buckets,
                rows, j, N, T, STRIDE, D, WIDTH, K, IRPE, PRECISION,
            ),
        )  # fmt: skip
    lowest = tl.min(scores[0], axis=1)
    for t in tl.static_range(1, _tiles_with(TILES, TOP_H)):
        lowest = tl.minimum(lowest, tl.min(scores[t], axis=1))
    # The padding is in the last tile: a tile has 16 keys and more, the padding fewer.
    j = begin(TILES, LAST) + tl.arange(0, TILES[LAST])
    scores = scores[:LAST] + (tl.where((j < N)[None, :], scores[LAST], -float("inf")),)
    highest = tl.max(scores[0], axis=1)
    for t in tl.static_range(1, len(TILES)):
        highest = tl.maximum(highest, tl.max(scores[t], axis=1))
    threshold = highest
    if TOP_H:
        threshold = find_threshold(scores, lowest, highest, i < N, TILES, TOP_H, BY_VALUE)
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
    factor = tl.where(i < N, 1.0 / total, 0.0)[:, None]
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for t in tl.static_range(len(TILES)):
        j = begin(TILES, t) + tl.arange(0, TILES[t])
        share = (shares[t] * factor).to(qkv.dtype.element_ty)
        _put_pairs(weights + n * T * T, share, i, j, T)
        v_tile = rows_of(qkv + 2 * HEADS * D, tl.minimum(j, N - 1), STRIDE, D, WIDTH)
        mixed = tl.dot(share, v_tile, mixed, input_precision=PRECISION)
    put_rows(out + crop * (N * HEADS * D) + head * D, mixed, i, N, HEADS * D, D)


@triton.jit
def _slope_kernel(
    grad,
    out,
    qkv,
    weights,
    r_v,
    from_value,
    buckets,
    slope,
    turned,
    grad_qkv,
    crops,
    scale,
    N: tl.constexpr,
    TILES: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    IRPE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = begin(TILES, len(TILES))
    STRIDE: tl.constexpr = 3 * HEADS * D
    n, head, crop, i = place_of(crops, T, ROWS)
    rows = tl.minimum(i, N - 1)
    qkv += crop * (N * STRIDE) + head * D
    start = crop * (N * HEADS * D) + head * D
    grad_tile = rows_of(grad + start, rows, HEADS * D, D, WIDTH)
    out_tile = rows_of(out + start, rows, HEADS * D, D, WIDTH)
    mean = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    from_value += n * N * K
    if IRPE:
        r_v += head * (K * D) if PER_HEAD else 0
        _meet_table(grad_tile, r_v, from_value, i, N, D, WIDTH, K, PRECISION)
    back = tl.zeros((ROWS, WIDTH), tl.float32)
    for t in tl.static_range(len(TILES)):
        j = begin(TILES, t) + tl.arange(0, TILES[t])
        steep = _slope_tile(
            grad_tile, mean, qkv + 2 * HEADS * D, weights + n * T * T, from_value,
            buckets, i, rows, j, scale, N, T, STRIDE, D, WIDTH, K, IRPE, PRECISION,
        ).to(qkv.dtype.element_ty)  # fmt: skip
        _put_pairs(slope + n * T * T, steep, i, j, T)
        _put_pairs(turned + n * T * T, tl.trans(steep), j, i, T)
        k_tile = rows_of(qkv + HEADS * D, tl.minimum(j, N - 1), STRIDE, D, WIDTH)
        back = tl.dot(steep, k_tile, back, input_precision=PRECISION)
    put_rows(grad_qkv + crop * (N * STRIDE) + head * D, back, i, N, STRIDE, D)


def attend(
    qkv: Tensor,
    r_k: Tensor | None,
    from_key: Tensor | None,
    buckets: Tensor | None,
    *,
    top_h: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Weights of every pair, and the values they mix.

    Args:
        qkv: (B, N, 3, H, d), contiguous.
        r_k: (K, d) or (H, K, d), contiguous; None: no positions.
        from_key: (n, N, K), products of the keys with r^Q.
        buckets: uint8 (T, T).
        top_h: keys that each query keeps, at most N; None: all.
        scale: of the scores, above 0.

    Returns:
        (B, N, H, d), without r^V, and weights (n, T, T).
    """
    crops, tokens, _, heads, width = qkv.shape
    padded = padded_tokens(tokens)
    out = qkv.new_empty(crops, tokens, heads, width)
    weights = qkv.new_empty(heads * crops, padded, padded)
    from_query = None if from_key is None else torch.empty_like(from_key)
    some: Any = qkv  # a pointer that is not read
    _attend_kernel[_programs(qkv, _ATTEND)](
        qkv,
        *(some if x is None else x for x in (r_k, from_query, from_key, buckets)),
        *(out, weights, crops, scale),
        TOP_H=top_h or 0,
        BY_VALUE=_ROUNDS_BY_VALUE,
        **_options(qkv, r_k, _ATTEND),
    )
    return out, weights


def slopes(
    grad: Tensor,
    out: Tensor,
    qkv: Tensor,
    weights: Tensor,
    r_v: Tensor | None,
    buckets: Tensor | None,
    grad_qkv: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradient for the products that the scores are scaled from, and its product with the keys.

    Args:
        grad: (B, N, H, d), contiguous, for the output.
        out: (B, N, H, d), the output with the part of r^V.
        qkv: as in `attend`.
        weights: (n, T, T) of `attend`.
        r_v: (K, d) or (H, K, d), contiguous; None: no positions.
        buckets: as in `attend`.
        grad_qkv: (B, N, 3, H, d); the part of the queries is written.
        scale: of the scores.

    Returns:
        (n, T, T) by query and key, and the same by key and query.
    """
    slope, turned = torch.empty_like(weights), torch.empty_like(weights)
    from_value = None
    if r_v is not None:
        from_value = qkv.new_empty(len(weights), qkv.shape[1], r_v.shape[-2])
    some: Any = qkv
    _slope_kernel[_programs(qkv, _SLOPES)](
        *(grad, out, qkv, weights),
        *(some if x is None else x for x in (r_v, from_value, buckets)),
        *(slope, turned, grad_qkv, qkv.shape[0], scale),
        **_options(qkv, r_v, _SLOPES),
    )
    return slope, turned


_TILE = 128  # keys of a tile at most: larger ones take too many registers at once
# Tokens up to which a program is of so many rows and warps, and of how many registers a thread
# (None: all there are); `benchmarks.sr_shapes` compares them.
Shape = tuple[int, int, int | None]
_ATTEND: dict[int, Shape] = {208: (64, 4, 168), 512: (64, 4, None)}
_SLOPES: dict[int, Shape] = {64: (16, 1, 128), 208: (64, 4, 168), 512: (64, 4, None)}


def _tiles(tokens: int) -> tuple[int, ...]:
    """Powers of two that make up a number of tokens (a multiple of 16), the largest first."""
    whole, rest = divmod(tokens, _TILE)
    return (_TILE,) * whole + tuple(size for size in (64, 32, 16) if rest & size)


def _shape(qkv: Tensor, shapes: dict[int, Shape]) -> Shape:
    padded = padded_tokens(qkv.shape[1])
    return next(shape for limit, shape in shapes.items() if padded <= limit)


def _programs(qkv: Tensor, shapes: dict[int, Shape]) -> tuple[int]:
    blocks = triton.cdiv(padded_tokens(qkv.shape[1]), _shape(qkv, shapes)[0])
    return (blocks * qkv.shape[0] * qkv.shape[3],)


def head_options(qkv: Tensor) -> dict[str, Any]:
    """What every kernel is compiled for. float32 products are in full, as the definition's."""
    tokens, _, heads, width = qkv.shape[1:]
    return {
        "N": tokens,
        "HEADS": heads,
        "D": width,
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "PRECISION": "ieee",
    }


def _options(qkv: Tensor, table: Tensor | None, shapes: dict[int, Shape]) -> dict[str, Any]:
    rows, warps, registers = _shape(qkv, shapes)
    return {
        **head_options(qkv),
        "TILES": _tiles(padded_tokens(qkv.shape[1])),
        "K": 1 if table is None else table.shape[-2],
        "ROWS": rows,
        "IRPE": table is not None,
        "PER_HEAD": table is not None and table.dim() == 3,
        "num_warps": warps,
        "maxnreg": registers,
    }
