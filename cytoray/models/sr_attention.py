"""SR-attention (Cyto-SSL, eq. 5-9): top-h sparse attention with relative positions on q, k and v.

`sr_attention` is the definition; `fast_sr_attention`, equal to it forward and backward, is what
models run: two Triton kernels on a CUDA device, PyTorch operations elsewhere.
Shapes: B batch, H heads, N tokens, d width of a head, K buckets, n = B * H.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cytoray.models.irpe import (
    pairs_from_keys,
    pairs_from_queries,
    sums_for_keys,
    sums_for_queries,
)
from cytoray.models.sr_ops import attend, row_threshold, slopes


class _Tables(NamedTuple):
    r_k: Tensor
    r_q: Tensor
    r_v: Tensor


class _Positions(NamedTuple):
    """Buckets of the pairs: to gather and sum by, and as they are for the kernels."""

    maps: Tensor
    buckets: Tensor


def sr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r_k: Tensor | None,
    r_q: Tensor | None,
    r_v: Tensor | None,
    buckets: Tensor | None,
    top_h: int | None,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """The definition, in plain differentiable PyTorch (it stores N * N * d: for tests and masks).

    R_ij = q_i . r^K_b(i,j) + k_j . r^Q_b(i,j)                 (7)
    P = (Q K^T + R) * scale                                    (8)
    out_i = sum_j softmax(M(P, h))_ij (v_j + r^V_b(i,j))       (9)

    where M, eq. (5), sets to -inf what is below the h-th largest entry of its row; ties at that
    value are all kept.

    Args:
        q: float (B, H, N, d), queries.
        k: float (B, H, N, d), keys.
        v: float (B, H, N, d), values.
        r_k: float (K, d), or (H, K, d) with a table a head; meets the query. None: no positions.
        r_q: the same, meets the key.
        r_v: the same, added to the value.
        buckets: int64 (N, N), see `cytoray.models.irpe.bucket_index`; None with the tables.
        top_h: keys that each query keeps; None: all.
        scale: usually d^-0.5.
        mask: bool (True may be seen) or float (added to P), broadcast to (B, H, N, N); the largest
            are then taken among what may be seen.

    Returns:
        (B, H, N, d).
    """
    head = "" if r_k is None or r_k.dim() == 2 else "h"
    scores = q @ k.transpose(-1, -2)
    if r_k is not None and r_q is not None:
        scores = scores + torch.einsum(f"bhid,{head}ijd->bhij", q, r_k[..., buckets, :])
        scores = scores + torch.einsum(f"bhjd,{head}ijd->bhij", k, r_q[..., buckets, :])
    scores = scores * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if top_h is not None and top_h < scores.shape[-1]:
        threshold = scores.detach().topk(top_h, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    weights = scores.softmax(-1)
    out = weights @ v
    if r_v is not None:
        out = out + torch.einsum(f"bhij,{head}ijd->bhid", weights, r_v[..., buckets, :])
    return out


def fast_sr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r_k: Tensor | None,
    r_q: Tensor | None,
    r_v: Tensor | None,
    buckets: Tensor | None,
    maps: Tensor | None,
    top_h: int | None,
    scale: float,
    *,
    kernels: bool = False,
) -> Tensor:
    """`sr_attention` without its N * N * d tensors, and with one N * N tensor kept for backward.

    Each query (key) meets the K vectors of a table once, and the N * N terms are read from the
    products by bucket; r^V is met by the sums of the weights in each bucket. Scores and softmax
    are at least float32, matrix products of the type of `v`.

    Args:
        buckets: as in `sr_attention`; read by the kernels alone.
        maps: `cytoray.models.irpe.pair_maps` of the tokens' grid; the rest as in `sr_attention`.
        kernels: run the Triton kernels, see `cytoray.models.sr_ops.kernels_serve`.
    """
    if top_h is not None and top_h >= q.shape[-2]:
        top_h = None
    if r_k is None and top_h is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return _SRAttention.apply(  # type: ignore[return-value]
        q, k, v, r_k, r_q, r_v, buckets, maps, top_h, scale, kernels
    )


def _weights(
    q: Tensor,
    k: Tensor,
    from_query: Tensor | None,
    from_key: Tensor | None,
    maps: Any,
    top_h: int | None,
) -> Tensor:
    """Weights (n, N, N) of every pair of queries and keys (n, N, d), by PyTorch operations."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.mT).to(wide)
    if from_query is not None and from_key is not None:
        scores += pairs_from_queries(from_query, maps)
        scores += pairs_from_keys(from_key, maps)
    if top_h is not None:
        # A difference of two floats is negative exactly if the first is the smaller. The shift
        # leaves the softmax as it is, and NaN passes, so that a diverged run is noticed.
        scores -= row_threshold(scores, top_h)
        torch.threshold_(scores, -torch.finfo(wide).tiny, -torch.inf)
    return scores.softmax(-1).to(q.dtype)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: _Tables | None,
    where: Any,
    top_h: int | None,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, weights (n, N, N) and their sums by bucket (B, H, N, K); q and r^Q come scaled."""
    shape = v.shape[:2]
    from_query, from_key = None, None
    if tables is not None:
        from_query, from_key = (
            (x @ table.mT).flatten(0, 1) for x, table in ((q, tables.r_k), (k, tables.r_q))
        )
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    if kernels:
        by_bucket = None if from_key is None else from_key.mT.contiguous()
        out, weights = attend(q, k, v, from_query, by_bucket, where.buckets, top_h)
    else:
        weights = _weights(q, k, from_query, from_key, where.maps, top_h)
        out = weights @ v
    out = out.unflatten(0, shape)
    if tables is None:
        return out, weights, None
    sums = sums_for_queries(weights, where.maps).unflatten(0, shape)
    return out + sums @ tables.r_v, weights, sums


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: _Tables | None,
    where: Any,
    out: Tensor,
    weights: Tensor,
    sums: Any,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Gradients for q, k, v and the tables as `_forward` takes them.

    What falls below the threshold has weight 0 and so no gradient: neither the scores nor the
    choice of the largest need be kept.
    """
    shape = v.shape[:2]
    from_value = None if tables is None else (grad @ tables.r_v.mT).flatten(0, 1)
    flat_grad, flat_q, flat_k, flat_v, flat_out = (t.flatten(0, 1) for t in (grad, q, k, v, out))
    if kernels:
        slope, grad_q = slopes(
            flat_grad, flat_out, flat_k, flat_v, weights, from_value, where.buckets
        )
    else:
        slope = (flat_grad @ flat_v.mT).to(torch.promote_types(v.dtype, torch.float32))
        if from_value is not None:
            slope += pairs_from_queries(from_value, where.maps)
        slope -= (flat_grad * flat_out).sum(-1, keepdim=True, dtype=slope.dtype)
        slope = slope.mul_(weights).to(v.dtype)
        grad_q = slope @ flat_k
    grad_q, grad_k, grad_v = (
        t.unflatten(0, shape) for t in (grad_q, slope.mT @ flat_q, weights.mT @ flat_grad)
    )
    if tables is None:
        return grad_q, grad_k, grad_v, None
    by_query, by_key = (
        collect(slope, where.maps).unflatten(0, shape)
        for collect in (sums_for_queries, sums_for_keys)
    )
    grad_q += by_query @ tables.r_k
    grad_k += by_key @ tables.r_q
    per_head = tables.r_k.dim() == 3
    grad_tables = (
        _products(by_query, q, per_head),
        _products(by_key, k, per_head),
        _products(sums, grad, per_head),
    )
    return grad_q, grad_k, grad_v, grad_tables


def _products(sums: Tensor, vectors: Tensor, per_head: bool) -> Tensor:
    """sum over the tokens of sums^T vectors: (B, H, N, K), (B, H, N, d) to (K, d) or (H, K, d)."""
    if per_head:
        return torch.einsum("bhnk,bhnd->hkd", sums, vectors)
    return sums.flatten(0, 2).mT @ vectors.flatten(0, 2)


class _SRAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, r_k, r_q, r_v, buckets, maps, top_h, scale, kernels):
        ctx.scale, ctx.kernels = scale, kernels
        ctx.table_type = None if r_k is None else r_k.dtype
        tables = None
        with torch.autocast(v.device.type, enabled=False):
            q, k, v = (q * scale).contiguous(), k.contiguous(), v.contiguous()
            if r_k is not None:
                tables = _Tables(r_k.to(v.dtype), (r_q * scale).to(v.dtype), r_v.to(v.dtype))
            result = _forward(q, k, v, tables, _Positions(maps, buckets), top_h, kernels)
        ctx.save_for_backward(q, k, v, *(tables or (None, None, None)), maps, buckets, *result)
        return result[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        q, k, v, *tables, maps, buckets, out, weights, sums = ctx.saved_tensors
        known = None if sums is None else _Tables(*tables)
        with torch.autocast(v.device.type, enabled=False):
            grad = grad.contiguous()
            where = _Positions(maps, buckets)
            grad_q, grad_k, grad_v, grad_tables = _backward(
                grad, q, k, v, known, where, out, weights, sums, ctx.kernels
            )
        if grad_tables is None:
            return grad_q * ctx.scale, grad_k, grad_v, *[None] * 8
        r_k, r_q, r_v = (x.to(ctx.table_type) for x in grad_tables)
        return grad_q * ctx.scale, grad_k, grad_v, r_k, r_q * ctx.scale, r_v, *[None] * 5
