"""A ViT in two parts: frozen blocks whose output can be kept, and the blocks above them.

Where LoRA adapts the last blocks only, what enters the first adapted block never changes, so it
can be computed once for many trials. Shapes: B images, N tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, is_grad_enabled, nn

# timm is imported where an encoder is looked at: trials on frozen features do without it.
if TYPE_CHECKING:
    from cytoray.models.encoder import Encoder


def prefix_obstacle(encoder: nn.Module) -> str:
    """Why an encoder cannot be run in two parts; empty if it can."""
    from timm.models.vision_transformer import VisionTransformer

    from cytoray.models.encoder import Encoder

    model = getattr(encoder, "model", None)
    if not isinstance(encoder, Encoder) or not isinstance(model, VisionTransformer):
        return f"{type(model or encoder).__name__} is no timm VisionTransformer of load_encoder"
    if type(model).forward_features is not VisionTransformer.forward_features:
        return f"{type(model).__name__} has a forward pass of its own"
    return ""


def frozen_blocks(encoder: nn.Module, adapted: int) -> int:
    """Blocks below the first adapted one.

    Args:
        encoder: one without `prefix_obstacle`.
        adapted: blocks at the end that are adapted; 0: all.
    """
    depth = len(cast(Any, encoder).model.blocks)
    return max(0, depth - adapted) if adapted else 0


def tokens_shape(encoder: nn.Module) -> tuple[int, int]:
    """N and D of the tokens of an image."""
    model = cast(Any, encoder).model
    return model.patch_embed.num_patches + model.num_prefix_tokens, model.embed_dim


def prefix_tokens(encoder: Encoder, images: Tensor, depth: int) -> Tensor:
    """What enters block `depth`: (B, N, D).

    Args:
        encoder: one without `prefix_obstacle`, in evaluation mode.
        images: as `Encoder.forward` takes them.
        depth: blocks to run; 0: the patch and position embedding alone.
    """
    vit = cast(Any, encoder.model)
    x = vit.patch_embed(encoder.prepare(images))
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
    return vit.blocks[:depth](x)


def features_from(encoder: Encoder, tokens: Tensor, depth: int) -> Tensor:
    """Features (B, D) of what `prefix_tokens` gave: together they equal `encoder(images)`."""
    from cytoray.models.encoder import POOLINGS

    return POOLINGS[encoder.spec.pooling](_Rest(encoder.model, depth), tokens)


class _Rest:
    """The blocks from one on and the head, as a timm model that takes tokens for images."""

    def __init__(self, vit: nn.Module, depth: int) -> None:
        self._vit, self._depth = cast(Any, vit), depth
        self.num_prefix_tokens = self._vit.num_prefix_tokens

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._vit.forward_head(self.forward_features(tokens))

    def forward_features(self, tokens: Tensor) -> Tensor:
        from timm.models import checkpoint_seq

        blocks = self._vit.blocks[self._depth :]
        if self._vit.grad_checkpointing and is_grad_enabled():
            return self._vit.norm(checkpoint_seq(blocks, tokens))
        return self._vit.norm(blocks(tokens))
