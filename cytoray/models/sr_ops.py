"""SR-attention by PyTorch operations as an operation of its own, forward and backward.

`torch.compile` takes it as it is, whatever shapes change with the step, and autograd keeps one
N * N tensor for it.
Shapes: B batch, H heads, n = B * H, N tokens, d width of a head, K buckets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cytoray.models.irpe import (
    NUM_BUCKETS,
    pairs_from_keys,
    pairs_from_queries,
    sums_for_keys,
    sums_for_queries,
)

SORT_THREADS = 6  # up to as many threads, numpy's vectorised sort is ahead of torch.topk


def row_threshold(scores: Tensor, h: int) -> Tensor:
    """The h-th largest entry of each row: (..., N) to (..., 1)."""
    if scores.device.type == "cpu" and torch.get_num_threads() <= SORT_THREADS:
        rows = np.sort(scores.detach().numpy(), axis=-1)
        return torch.from_numpy(rows[..., -h, None].copy())
    return scores.topk(h, dim=-1).values[..., -1:]


class _Tables(NamedTuple):
    """Relative positions (K, d) or (H, K, d) in the type of the values; `r_q` comes scaled."""

    r_k: Tensor
    r_q: Tensor
    r_v: Tensor


def _tables(
    r_k: Tensor | None, r_q: Tensor | None, r_v: Tensor | None, scale: float, dtype: torch.dtype
) -> _Tables | None:
    if r_k is None or r_q is None or r_v is None:
        return None
    return _Tables(r_k.to(dtype), (r_q * scale).to(dtype), r_v.to(dtype))


@torch.library.custom_op("cytoray::sr_attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r_k: Tensor | None,
    r_q: Tensor | None,
    r_v: Tensor | None,
    maps: Tensor | None,
    top_h: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cytoray.models.sr_attention.fast_sr_attention`, with what its gradient needs.

    Returns:
        Output (B, H, N, d), the weights (n, N, N) and, with tables, their sums by bucket
        (B, H, N, K). The latter two have no gradient.
    """
    with torch.autocast(v.device.type, enabled=False):
        tables = _tables(r_k, r_q, r_v, scale, v.dtype)
        q, k, v = (t.contiguous() for t in (q * scale, k, v))
        from_query, from_key = None, None
        if tables is not None:
            from_query, from_key = (
                (x @ table.mT).flatten(0, 1) for x, table in ((q, tables.r_k), (k, tables.r_q))
            )
        shape = v.shape[:2]
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        weights = _weights(q, k, from_query, from_key, maps, top_h)
        out = (weights @ v).unflatten(0, shape)
        if tables is None or maps is None:
            return out, weights, v.new_empty(0)
        sums = sums_for_queries(weights, maps).contiguous().unflatten(0, shape)
        return out + sums @ tables.r_v, weights, sums


@attend.register_fake
def _(q, k, v, r_k, r_q, r_v, maps, top_h, scale):
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    sums = v.new_empty(0) if r_k is None else v.new_empty(*v.shape[:-1], NUM_BUCKETS)
    tokens = v.shape[2]
    return out, v.new_empty(v.shape[0] * v.shape[1], tokens, tokens), sums


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


@torch.library.custom_op("cytoray::sr_attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r_k: Tensor | None,
    r_q: Tensor | None,
    r_v: Tensor | None,
    maps: Tensor | None,
    out: Tensor,
    weights: Tensor,
    sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k, v (B, H, N, d) and the tables (empty where there are none).

    What falls below the threshold has weight 0 and so no gradient: neither the scores nor the
    choice of the largest need be kept.

    Args:
        grad: (B, H, N, d), for the output; the rest as `attend` takes and returns it.
    """
    with torch.autocast(v.device.type, enabled=False):
        tables = _tables(r_k, r_q, r_v, scale, v.dtype)
        shape = v.shape[:2]
        q, k, v, grad, out = (t.contiguous() for t in (q * scale, k, v, grad, out))
        from_value = None if tables is None else (grad @ tables.r_v.mT).flatten(0, 1)
        flat_grad, flat_q, flat_k, flat_v, flat_out = (
            t.flatten(0, 1) for t in (grad, q, k, v, out)
        )
        slope = (flat_grad @ flat_v.mT).to(torch.promote_types(v.dtype, torch.float32))
        if from_value is not None:
            slope += pairs_from_queries(from_value, _known(maps))
        slope -= (flat_grad * flat_out).sum(-1, keepdim=True, dtype=slope.dtype)
        slope = slope.mul_(weights).to(v.dtype)
        grad_q = slope @ flat_k
        grad_q, grad_k, grad_v = (
            t.unflatten(0, shape) for t in (grad_q, slope.mT @ flat_q, weights.mT @ flat_grad)
        )
        if tables is None or r_k is None:
            nothing = (v.new_empty(0), v.new_empty(0), v.new_empty(0))
            return grad_q.mul_(scale), grad_k, grad_v, *nothing
        by_query, by_key = (
            collect(slope, _known(maps)).unflatten(0, shape)
            for collect in (sums_for_queries, sums_for_keys)
        )
        grad_q += by_query @ tables.r_k
        grad_k += by_key @ tables.r_q
        per_head = r_k.dim() == 3
        grad_r_k, grad_r_q, grad_r_v = (
            _products(collected, x, per_head).to(r_k.dtype)
            for collected, x in ((by_query, q), (by_key, k), (sums, grad))
        )
        return grad_q.mul_(scale), grad_k, grad_v, grad_r_k, grad_r_q.mul_(scale), grad_r_v


@attend_backward.register_fake
def _(grad, q, k, v, r_k, r_q, r_v, maps, out, weights, sums, scale):
    like = (q, k, v) if r_k is None else (q, k, v, r_k, r_q, r_v)
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]
    return *made, *(v.new_empty(0) for _ in range(6 - len(made)))


def _known(maps: Tensor | None) -> Tensor:
    assert maps is not None
    return maps


def _products(sums: Tensor, vectors: Tensor, per_head: bool) -> Tensor:
    """sum over the tokens of sums^T vectors: (B, H, N, K), (B, H, N, d) to (K, d) or (H, K, d)."""
    if per_head:
        return torch.einsum("bhnk,bhnd->hkd", sums, vectors).contiguous()
    return sums.flatten(0, 2).mT @ vectors.flatten(0, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # those of the weights would be as large as they are
    ctx.save_for_backward(*tensors, *output)


def _go_back(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    found = attend_backward(grad, *saved, ctx.scale)
    grads = found if saved[3] is not None else (*found[:3], None, None, None)
    return *grads, *(None,) * 3


attend.register_autograd(_go_back, setup_context=_keep)
