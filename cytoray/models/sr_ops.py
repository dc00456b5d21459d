"""Operations of SR-attention that `torch.compile` takes as they are.

Shapes: n batch times heads, N tokens, d width of a head, K buckets.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

KERNEL_TOKENS = 512  # rows of as many scores fit the registers of a kernel
KERNEL_TYPES = (torch.bfloat16, torch.float16)  # products of float32 are not for a kernel so large
SORT_THREADS = 6  # up to as many threads, numpy's vectorised sort is ahead of torch.topk
_ALIGNED = 8  # rows of bf16 weights start at multiples of 16 bytes, as fast products ask


@torch.library.custom_op("cytoray::row_threshold", mutates_args=())
def row_threshold(scores: Tensor, h: int) -> Tensor:
    """The h-th largest entry of each row: (..., N) to (..., 1)."""
    if scores.device.type == "cpu" and torch.get_num_threads() <= SORT_THREADS:
        rows = np.sort(scores.detach().numpy(), axis=-1)
        return torch.from_numpy(rows[..., -h, None].copy())
    return scores.topk(h, dim=-1).values[..., -1:].contiguous()


@row_threshold.register_fake
def _(scores: Tensor, h: int) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], 1)


def kernels_serve(v: Tensor) -> bool:
    """Whether the Triton kernels can attend to values (B, H, N, d): device, type and length."""
    return (
        v.device.type == "cuda"
        and v.dtype in KERNEL_TYPES
        and v.shape[-2] <= KERNEL_TOKENS
        and find_spec("triton") is not None
    )


def empty_pairs(v: Tensor) -> Tensor:
    """Memory for (n, N, N) of the type of `v` (n, N, d), each row padded to whole 16 bytes."""
    n, tokens = v.shape[:2]
    padded = -(-tokens // _ALIGNED) * _ALIGNED
    return v.new_empty(n, tokens, padded)[..., :tokens]


@torch.library.custom_op("cytoray::sr_attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    from_query: Tensor | None,
    from_key: Tensor | None,
    buckets: Tensor | None,
    top_h: int | None,
) -> tuple[Tensor, Tensor]:
    """`cytoray.models.sr_kernels.attend`."""
    from cytoray.models import sr_kernels

    with torch.cuda.device_of(q):
        return sr_kernels.attend(q, k, v, from_query, from_key, buckets, top_h)


@attend.register_fake
def _(q, k, v, from_query, from_key, buckets, top_h):
    return torch.empty_like(v), empty_pairs(v)


@torch.library.custom_op("cytoray::sr_slopes", mutates_args=())
def slopes(
    grad: Tensor,
    out: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    from_value: Tensor | None,
    buckets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`cytoray.models.sr_kernels.slopes`."""
    from cytoray.models import sr_kernels

    with torch.cuda.device_of(grad):
        return sr_kernels.slopes(grad, out, k, v, weights, from_value, buckets)


@slopes.register_fake
def _(grad, out, k, v, weights, from_value, buckets):
    return empty_pairs(v), torch.empty_like(v)
