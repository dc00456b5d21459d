"""Where a ViT looks: the attention of its class token in the last block.

Shapes: B images, H heads, N tokens, d width of a head, h x w patches.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from cytoray.models.encoder import Encoder
from cytoray.models.irpe import PatchGrids, cached_buckets
from cytoray.models.sr_attention import sr_attention
from cytoray.models.sr_transformer import REPLACEABLE, SRAttention, SRConfig


@torch.no_grad()
def attention_of_images(encoder: Encoder, images: Tensor) -> Tensor | None:
    """Attention of the class token to the patches, mean over the heads of the last block.

    A ViT without a class token gives the attention that a patch gets from all of them.

    Args:
        encoder: in evaluation mode.
        images: as `Encoder.forward` takes them.

    Returns:
        float (B, h, w), each summing to 1; None for a model without such attention, as a ResNet.
    """
    model = cast(Any, encoder.model)
    blocks = getattr(model, "blocks", None)
    attention = blocks[-1].attn if blocks and hasattr(blocks[-1], "attn") else None
    patch_embed = getattr(model, "patch_embed", None)
    if not isinstance(attention, (*REPLACEABLE, SRAttention)) or patch_embed is None:
        return None
    seen: list[tuple[Tensor, Tensor | None]] = []
    hook = attention.register_forward_pre_hook(
        lambda _, given, named: seen.append((given[0], named.get("rope"))), with_kwargs=True
    )
    try:
        x = encoder.prepare(images)
        model.forward_features(x)
        grid = patch_embed.dynamic_feat_size(x.shape[-2:])
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        weights = _weights(attention, *seen[-1], grid, prefix)
    finally:
        hook.remove()
    row = weights[:, :, 0, prefix:] if prefix else weights.mean(dim=2)
    row = row.mean(dim=1)
    return (row / row.sum(dim=1, keepdim=True)).unflatten(1, tuple(grid))


def _weights(
    attention: nn.Module, x: Tensor, rope: Tensor | None, grid: tuple[int, int], prefix: int
) -> Tensor:
    """Attention weights (B, H, N, N) of a block for its input (B, N, D) and rotary embedding."""
    if not isinstance(attention, SRAttention):  # with both parts off it is the plain one
        attention = SRAttention(attention, PatchGrids(prefix), SRConfig())
    q, k, _ = attention.project(x, rope).permute(2, 0, 3, 1, 4)
    one_hot = torch.eye(x.shape[1], device=x.device, dtype=q.dtype).expand(*q.shape[:2], -1, -1)
    buckets = cached_buckets(grid, prefix, x.device) if attention.config.irpe else None
    top_h = attention.config.top_h if attention.config.sparse else None
    tables = (attention.rel_k, attention.rel_q, None)
    return sr_attention(q, k, one_hot, *tables, buckets, top_h, attention.scale)
