"""SR-attention by the Triton kernels as an operation of its own, forward and backward.

`torch.compile` takes it as it is and autograd keeps one T * T tensor for it. Pairs and buckets are
padded to whole 16: products of ragged matrices take several times as long.
Shapes: B crops, H heads, n = H * B (all crops of a head follow each other), N tokens, T those and
what pads them, d width of a head, K buckets with those that pad them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cytoray.models.irpe import NUM_BUCKETS, PADDED_BUCKETS, KernelMaps, padded_tokens


def attend_by_kernels(
    qkv: Tensor,
    r_k: Tensor | None,
    r_q: Tensor | None,
    r_v: Tensor | None,
    maps: KernelMaps | None,
    top_h: int | None,
    scale: float,
) -> Tensor:
    """`cytoray.models.sr_attention.fast_sr_attention` by the kernels.

    Args:
        qkv: (B, N, 3, H, d), queries, keys and values as one projection makes them.
        r_k, r_q, r_v: as there.
        maps: of the tokens' grid; None with the tables.
        top_h: as there.
        scale: as there.

    Returns:
        (B, N, H, d).
    """
    if top_h is not None and top_h >= qkv.shape[1]:
        top_h = None
    qkv = qkv.contiguous()
    if r_k is None or r_q is None or r_v is None:
        return attend(qkv, None, None, None, None, top_h, scale)[0]
    assert maps is not None
    tables = torch.stack([r_k, r_q, r_v]).to(qkv.dtype)
    tables = F.pad(tables, (0, 0, 0, PADDED_BUCKETS - NUM_BUCKETS))
    # By name: torch 2.11 cannot unpack a named tuple in code it compiles.
    each = (maps.buckets, maps.of_queries, maps.of_keys)
    return attend(qkv, tables, *each, top_h, scale)[0]


@torch.library.custom_op("cytoray::sr_attend_kernels", mutates_args=())
def attend(
    qkv: Tensor,
    tables: Tensor | None,
    buckets: Tensor | None,
    of_queries: Tensor | None,
    of_keys: Tensor | None,
    top_h: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels mix, with what its gradient needs.

    Args:
        qkv: (B, N, 3, H, d), contiguous.
        tables: r^K, r^Q and r^V, (3, K, d) or (3, H, K, d); None with the three maps.
        buckets, of_queries, of_keys: of `KernelMaps`.
        top_h: keys that each query keeps, below N; None: all.
        scale: of the scores.

    Returns:
        Output (B, N, H, d), the weights (n, T, T) and, with tables, their sums by bucket
        (1, n, N, K). The latter two have no gradient.
    """
    from cytoray.models import sr_kernels

    with torch.autocast(qkv.device.type, enabled=False), torch.cuda.device_of(qkv):
        r_k, from_key = None, None
        if tables is not None:
            r_k, from_key = tables[0], _table_products(qkv[:, :, 1], tables[1])
        out, weights = sr_kernels.attend(qkv, r_k, from_key, buckets, top_h=top_h, scale=scale)
        if tables is None or of_queries is None:
            return out, weights, qkv.new_empty(0)
        sums = weights.new_empty(1, len(weights), qkv.shape[1], tables.shape[-2])
        _sum_pairs(weights, of_queries, sums[0])
        _by_head(out).baddbmm_(_by_head_and_row(sums[0], out), _of_heads(tables[2], out.shape[2]))
        return out, weights, sums


@attend.register_fake
def _(qkv, tables, buckets, of_queries, of_keys, top_h, scale):
    crops, tokens, _, heads, width = qkv.shape
    n, padded = heads * crops, padded_tokens(tokens)
    sums = qkv.new_empty(0) if tables is None else qkv.new_empty(1, n, tokens, tables.shape[-2])
    out = qkv.new_empty(crops, tokens, heads, width)
    return out, qkv.new_empty(n, padded, padded), sums


@torch.library.custom_op("cytoray::sr_attend_kernels_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    qkv: Tensor,
    tables: Tensor | None,
    buckets: Tensor | None,
    of_queries: Tensor | None,
    of_keys: Tensor | None,
    out: Tensor,
    weights: Tensor,
    sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients for qkv (B, N, 3, H, d) and the tables (empty where there are none).

    What falls below the threshold has weight 0 and so no gradient: neither the scores nor the
    choice of the largest need be kept.

    Args:
        grad: (B, N, H, d), for the output; the rest as `attend` has it.
    """
    from cytoray.models import sr_kernel_products, sr_kernels

    with torch.autocast(qkv.device.type, enabled=False), torch.cuda.device_of(qkv):
        grad = grad.contiguous()
        grad_qkv = torch.empty_like(qkv)
        r_v = None if tables is None else tables[2]
        slope, turned = sr_kernels.slopes(
            grad, out, qkv, weights, r_v, buckets, grad_qkv, scale=scale
        )
        sr_kernel_products.add_key_gradients(turned, weights, qkv, grad, grad_qkv)
        if tables is None or of_queries is None or of_keys is None:
            return grad_qkv, qkv.new_empty(0)
        slope_sums = sums.new_empty(2, *sums.shape[1:])
        _sum_pairs(slope, of_queries, slope_sums[0])
        _sum_pairs(turned, of_keys, slope_sums[1])
        grad_tables = torch.cat(
            [
                sr_kernel_products.table_gradients(slope_sums, qkv, tables, grad_qkv),
                sr_kernel_products.table_gradients(sums, grad.unsqueeze(2), tables[2:]),
            ]
        )
        return grad_qkv, grad_tables.to(tables.dtype)


@attend_backward.register_fake
def _(grad, qkv, tables, buckets, of_queries, of_keys, out, weights, sums, scale):
    grad_tables = qkv.new_empty(0) if tables is None else torch.empty_like(tables)
    return torch.empty_like(qkv), grad_tables


def _by_head(x: Tensor) -> Tensor:
    """(B, N, H, d), wherever it lies, as (H, B * N, d)."""
    return x.flatten(0, 1).transpose(0, 1)


def _by_head_and_row(sums: Tensor, x: Tensor) -> Tensor:
    """(n, N, K) as (H, B * N, K), for x (B, N, H, d)."""
    return sums.view(x.shape[2], x.shape[0] * x.shape[1], sums.shape[-1])


def _of_heads(table: Tensor, heads: int) -> Tensor:
    """A table (K, d) or (H, K, d) as (H, K, d)."""
    return table.expand(heads, -1, -1)


def _table_products(x: Tensor, table: Tensor) -> Tensor:
    """x (B, N, H, d) times a table (K, d) or (H, K, d), transposed: (n, N, K)."""
    crops, tokens, heads, _ = x.shape
    products = torch.bmm(_by_head(x), _of_heads(table, heads).mT)
    return products.view(heads * crops, tokens, products.shape[-1])


def _sum_pairs(pairs: Tensor, maps: Tensor, sums: Tensor) -> None:
    """sum over the second tokens of a bucket: (n, T, T) with maps (T, T, K) into (n, N, K)."""
    tokens = sums.shape[1]
    torch.bmm(pairs[:, :tokens].transpose(0, 1), maps[:tokens], out=sums.transpose(0, 1))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # those of the weights would be as large as they are
    ctx.save_for_backward(*tensors, *output)


def _go_back(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    grad_qkv, grad_tables = attend_backward(grad, *saved, ctx.scale)
    return grad_qkv, None if saved[1] is None else grad_tables, *(None,) * 5


attend.register_autograd(_go_back, setup_context=_keep)
