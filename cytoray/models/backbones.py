"""timm vision transformers as SSL backbones: mask tokens, batch-subset drop path, plain timm keys.

Shapes: B crops, N patches, D width.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cytoray.errors import InputError
from cytoray.models.drop_path import DropRows, subset_block
from cytoray.models.sr_transformer import SR_TABLES, SRConfig, use_sr


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """Sizes of an architecture, known without allocating its weights."""

    patch_px: int
    embed_dim: int
    depth: int


@dataclass(frozen=True)
class Tokens:
    """Normed output tokens: `cls` (B, D), `patches` (B, N, D); registers are in neither."""

    cls: Tensor
    patches: Tensor


def close_names(name: str, valid: Sequence[str]) -> str:
    """`did you mean a, b?` for the names nearest to `name`, else an empty string."""
    near = difflib.get_close_matches(name, valid, n=5, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


@lru_cache(maxsize=64)
def backbone_facts(
    name: str, kwargs: tuple[tuple[str, Any], ...] = (), sr: SRConfig | None = None
) -> BackboneFacts:
    """Patch size, width and depth of a timm ViT, from a model without memory (meta device).

    Args:
        name: timm architecture.
        kwargs: sorted (argument, value) pairs of `timm.create_model`.
        sr: SR-attention that it is to have.

    Raises:
        InputError: unknown name, arguments timm refuses, not a ViT with a class token, or one that
            cannot have SR-attention.
    """
    with torch.device("meta"):
        vit = _with_sr(_create_vit(name, pretrained=False, kwargs=dict(kwargs)), sr)
    patch_px = cast(tuple[int, int], vit.patch_embed.patch_size)[0]
    return BackboneFacts(patch_px=patch_px, embed_dim=vit.embed_dim, depth=len(vit.blocks))


def _create_vit(name: str, *, pretrained: bool, kwargs: Mapping[str, Any]) -> VisionTransformer:
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        names = timm.list_models("vit_*") + timm.list_models("deit*")
        raise InputError(f"unknown backbone {name!r}{close_names(architecture, names)}")
    options = {"dynamic_img_size": True, "num_classes": 0, "global_pool": "token", **kwargs}
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except (TypeError, ValueError, AssertionError, OSError, RuntimeError) as error:
        raise InputError(f"timm cannot build backbone {name!r} with {dict(kwargs)}: {error}") from (
            error
        )
    if not isinstance(model, VisionTransformer) or model.cls_token is None:
        raise InputError(
            f"backbone {name!r} is not a timm VisionTransformer with a class token; "
            "take one of timm.list_models('vit_*')"
        )
    return model


def _with_sr(vit: VisionTransformer, sr: SRConfig | None) -> VisionTransformer:
    return vit if sr is None else use_sr(vit, **dataclasses.asdict(sr))


class ViTBackbone(nn.Module):
    """A timm ViT that can see masked patches and drop residual branches for part of a batch.

    Args:
        vit: the timm model; `self.vit.state_dict()` has timm's own keys.
        checkpoint_blocks: recompute each block in the backward pass to save memory.
    """

    def __init__(self, vit: VisionTransformer, *, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim))
        self.checkpoint_blocks = checkpoint_blocks

    @property
    def embed_dim(self) -> int:
        """Width D of the tokens."""
        return self.vit.embed_dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    @property
    def patch_px(self) -> int:
        """Side of a patch."""
        return cast(tuple[int, int], self.vit.patch_embed.patch_size)[0]

    def forward(
        self, images: Tensor, mask: Tensor | None = None, drop: DropRows | None = None
    ) -> Tokens:
        """Encode crops.

        Args:
            images: float (B, 3, H, W), normalised; H and W multiples of the patch.
            mask: bool (B, N), True where the patch embedding is replaced by the mask token
                (before the position embedding is added, as in DINOv2).
            drop: rows that each residual branch sees; None: all.
        """
        x = cast(Tensor, self.vit.patch_embed(images))
        if mask is not None:
            x = torch.where(mask.view(*x.shape[:-1], 1), self.mask_token.to(x.dtype), x)
        x = self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(x)))
        for index, block in enumerate(self.vit.blocks):
            x = self._block(block, x, drop, index)
        x = self.vit.norm(x)
        return Tokens(x[:, 0], x[:, self.vit.num_prefix_tokens :])

    def _block(self, block: nn.Module, x: Tensor, drop: DropRows | None, index: int) -> Tensor:
        run: Callable[[Tensor], Tensor] = block
        if drop is not None:
            attn_rows, mlp_rows = drop.rows[index]
            run = partial(
                subset_block, block, attn_rows=attn_rows, mlp_rows=mlp_rows, scale=drop.scale
            )
        if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(run, x, use_reentrant=False))
        return run(x)


def build_backbone(
    name: str,
    *,
    img_px: int,
    pretrained: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    sr: SRConfig | None = None,
    checkpoint_blocks: bool = False,
) -> ViTBackbone:
    """Build a backbone; random weights come from torch's global generator.

    Args:
        name: timm architecture, with or without a weight tag.
        img_px: side of the crops for which the position table is made (others are resampled).
        pretrained: load timm's published weights.
        weights: timm-keyed weights to start from instead; relative position tables that they do
            not have stay zero.
        kwargs: further arguments of `timm.create_model`.
        sr: SR-attention in place of the plain one.
        checkpoint_blocks: recompute the blocks in the backward pass.

    Raises:
        InputError: unknown name or arguments, or weights that do not fit.
    """
    vit = _create_vit(name, pretrained=pretrained, kwargs={"img_size": img_px, **(kwargs or {})})
    vit = _with_sr(vit, sr)
    if weights is not None:
        new_tables = {k: v for k, v in vit.state_dict().items() if k.endswith(SR_TABLES)}
        try:
            vit.load_state_dict(new_tables | dict(weights))
        except RuntimeError as error:
            raise InputError(f"the weights to start from do not fit {name!r}: {error}") from error
    return ViTBackbone(vit, checkpoint_blocks=checkpoint_blocks)


def default_drop_path(embed_dim: int) -> float:
    """Drop path that fits a width: 0.3 from 1024 (ViT-L), 0.1 from 768 (ViT-B), else none."""
    return 0.3 if embed_dim >= 1024 else 0.1 if embed_dim >= 768 else 0.0
