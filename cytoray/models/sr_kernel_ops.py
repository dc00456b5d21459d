"""SR-attention by the Triton kernels as an operation of its own, forward and backward.

`torch.compile` takes it as it is and autograd keeps one T * T tensor for it. Everything is padded
to whole 16 tokens and buckets: products of ragged matrices take several times as long.
Shapes: B batch, H heads, n = B * H, T tokens with those that pad them, d width of a head, K buckets
with those that pad them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cytoray.models.irpe import NUM_BUCKETS, PADDED_BUCKETS, KernelMaps, padded_tokens


def attend_by_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r_k: Tensor | None,
    r_q: Tensor | None,
    r_v: Tensor | None,
    maps: KernelMaps | None,
    top_h: int | None,
    scale: float,
) -> Tensor:
    """`cytoray.models.sr_attention.fast_sr_attention` for (B, H, N, d) on a CUDA device."""
    tokens = q.shape[2]
    more = padded_tokens(tokens) - tokens
    q, k, v = (F.pad(x, (0, 0, 0, more)).contiguous() for x in (q, k, v))
    if r_k is None or r_q is None or r_v is None:
        out = attend(q, k, v, None, None, None, None, tokens, top_h, scale)[0]
    else:
        assert maps is not None
        tables = torch.stack([r_k, r_q, r_v]).to(v.dtype)
        tables = F.pad(tables, (0, 0, 0, PADDED_BUCKETS - NUM_BUCKETS))
        # By name: torch 2.11 cannot unpack a named tuple in code it compiles.
        each = (maps.buckets, maps.of_queries, maps.of_keys)
        out = attend(q, k, v, tables, *each, tokens, top_h, scale)[0]
    return out[:, :, :tokens]


@torch.library.custom_op("cytoray::sr_attend_kernels", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor | None,
    buckets: Tensor | None,
    of_queries: Tensor | None,
    of_keys: Tensor | None,
    tokens: int,
    top_h: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels mix, with what its gradient needs.

    Args:
        q: (B, H, T, d), contiguous, zero past `tokens`; as `k` and `v`.
        tables: r^K, r^Q and r^V, (3, K, d) or (3, H, K, d); None with the three maps.
        buckets, of_queries, of_keys: of `KernelMaps`.

    Returns:
        Output (B, H, T, d), the weights (n, T, T) and, with tables, their sums by bucket
        (n, T, K). The latter two have no gradient.
    """
    from cytoray.models import sr_kernels

    with torch.autocast(v.device.type, enabled=False), torch.cuda.device_of(v):
        from_query, from_key = None, None
        if tables is not None:
            from_query = (q @ tables[0].mT).flatten(0, 1)
            from_key = (k @ tables[1].mT).flatten(0, 1)
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        out, weights = sr_kernels.attend(
            flat_q, flat_k, flat_v, from_query, from_key, buckets,
            tokens=tokens, top_h=top_h, scale=scale,
        )  # fmt: skip
        out = out.view(v.shape)
        if tables is None or of_queries is None:
            return out, weights, v.new_empty(0)
        sums = _sums(weights, of_queries)
        return _add_product(out, sums, tables[2]), weights, sums


@attend.register_fake
def _(q, k, v, tables, buckets, of_queries, of_keys, tokens, top_h, scale):
    n, padded = v.shape[0] * v.shape[1], v.shape[2]
    sums = v.new_empty(0) if tables is None else v.new_empty(n, padded, tables.shape[-2])
    return torch.empty_like(v), v.new_empty(n, padded, padded), sums


@torch.library.custom_op("cytoray::sr_attend_kernels_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor | None,
    buckets: Tensor | None,
    of_queries: Tensor | None,
    of_keys: Tensor | None,
    out: Tensor,
    weights: Tensor,
    sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k, v (B, H, T, d) and the tables (empty where there are none).

    What falls below the threshold has weight 0 and so no gradient: neither the scores nor the
    choice of the largest need be kept.

    Args:
        grad: (B, H, T, d), for the output, zero past the tokens; the rest as `attend` has it.
    """
    from cytoray.models import sr_kernels

    with torch.autocast(v.device.type, enabled=False), torch.cuda.device_of(v):
        grad = grad.contiguous()
        from_value = None if tables is None else (grad @ tables[2].mT).flatten(0, 1)
        flat_grad, flat_out, flat_q, flat_k, flat_v = (
            x.flatten(0, 1) for x in (grad, out, q, k, v)
        )
        slope, turned, grad_q = sr_kernels.slopes(
            flat_grad, flat_out, flat_k, flat_v, weights, from_value, buckets, scale=scale
        )
        grad_q, grad_k, grad_v = (
            x.view(v.shape) for x in (grad_q, turned @ flat_q, weights.mT @ flat_grad)
        )
        if tables is None or of_queries is None or of_keys is None:
            return grad_q, grad_k, grad_v, v.new_empty(0)
        by_query, by_key = _sums(slope, of_queries), _sums(turned, of_keys)
        grad_tables = torch.empty_like(tables)
        for made, sums_of, vectors in zip(
            grad_tables, (by_query, by_key, sums), (q, k, grad), strict=True
        ):
            _products(sums_of, vectors, made)
        grad_q = _add_product(grad_q, by_query, tables[0])
        grad_k = _add_product(grad_k, by_key, tables[1])
        return grad_q, grad_k, grad_v, grad_tables


@attend_backward.register_fake
def _(grad, q, k, v, tables, buckets, of_queries, of_keys, out, weights, sums, scale):
    grad_tables = v.new_empty(0) if tables is None else torch.empty_like(tables)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), grad_tables


def _sums(pairs: Tensor, maps: Tensor) -> Tensor:
    """sum over the second tokens of a bucket: (n, T, T) with maps (T, T, K) to (n, T, K)."""
    sums = pairs.new_empty(*pairs.shape[:2], maps.shape[-1])
    torch.bmm(pairs.transpose(0, 1), maps, out=sums.transpose(0, 1))
    return sums


def _add_product(x: Tensor, sums: Tensor, table: Tensor) -> Tensor:
    """x + sums @ table, in the memory of `x` (B, H, T, d), for a table (K, d) or (H, K, d)."""
    if table.dim() == 2:
        x.view(-1, x.shape[-1]).addmm_(sums.flatten(0, 1), table)
        return x
    return x.add_(sums.view(*x.shape[:3], -1) @ table)


def _products(sums: Tensor, vectors: Tensor, made: Tensor) -> None:
    """sum over the tokens of sums^T vectors: (n, T, K), (B, H, T, d) into (K, d) or (H, K, d)."""
    if made.dim() == 2:
        torch.mm(sums.flatten(0, 1).mT, vectors.flatten(0, 2), out=made)
    else:
        made.copy_(torch.einsum("bhtk,bhtd->hkd", sums.view(*vectors.shape[:3], -1), vectors))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, _, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # those of the weights would be as large as they are
    ctx.save_for_backward(*tensors, *output)


def _go_back(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    *found, grad_tables = attend_backward(grad, *saved, ctx.scale)
    return *found, None if saved[3] is None else grad_tables, *(None,) * 6


attend.register_autograd(_go_back, setup_context=_keep)
