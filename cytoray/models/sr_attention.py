"""SR-attention (Cyto-SSL, eq. 5-9): top-h sparse attention with relative positions on q, k and v.

`sr_attention` is the definition. Models run what is equal to it, forward and backward: Triton
kernels on a CUDA device (`attend_by_kernels` where `kernels_serve`), else `fast_sr_attention`.
Shapes: B batch, H heads, N tokens, d width of a head, K buckets.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from cytoray.models.irpe import has_kernels
from cytoray.models.sr_ops import attend

KERNEL_TYPES = (torch.bfloat16, torch.float16)  # products of float32 are not for a kernel so large
_HAS_TRITON = find_spec("triton") is not None  # asked once: in a block it would cut compiled code


def kernels_serve(qkv: Tensor) -> bool:
    """Whether the Triton kernels serve queries, keys and values (B, N, 3, H, d)."""
    return has_kernels(qkv.device, qkv.shape[1]) and qkv.dtype in KERNEL_TYPES and _HAS_TRITON


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
    maps: Tensor | None,
    top_h: int | None,
    scale: float,
) -> Tensor:
    """`sr_attention` without its N * N * d tensors, and with one N * N tensor kept for backward.

    Each query (key) meets the K vectors of a table once, and the N * N terms are read from the
    products by bucket; r^V is met by the sums of the weights in each bucket. Scores and softmax
    are at least float32, matrix products of the type of `v`.

    Args:
        maps: `cytoray.models.irpe.pair_maps` of the tokens' grid; None with the tables. The rest
            as in `sr_attention`.
    """
    if top_h is not None and top_h >= q.shape[-2]:
        top_h = None
    if r_k is None and top_h is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return attend(q, k, v, r_k, r_q, r_v, maps, top_h, scale)[0]
