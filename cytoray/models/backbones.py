"""timm models as SSL backbones: mask tokens, batch-subset drop path, LoRA, plain timm keys.

Shapes: B crops, N patches, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cytoray.models.architectures import create_model
from cytoray.models.block_pass import Kept, Sizes, attach, join_groups
from cytoray.models.drop_path import DropRows
from cytoray.models.lora import add_lora, lora_layers, merge_lora
from cytoray.models.position_table import add_positions
from cytoray.models.sr_transformer import SRConfig, use_sr
from cytoray.models.starting_weights import load_start

if TYPE_CHECKING:
    from cytoray.models.conv_backbone import ConvBackbone


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """Sizes of an architecture, known without allocating its weights."""

    patch_px: int
    embed_dim: int
    depth: int
    is_transformer: bool = True


@dataclass(frozen=True, kw_only=True)
class LoRAChoice:
    """Low-rank updates trained in place of the encoder's weights, which stay as they are.

    Attributes:
        rank: of the updates; 0: train the weights themselves.
        alpha: scale; an update counts alpha / sqrt(rank).
        targets: any of `q`, `k`, `v`, `o`, `mlp`.
    """

    rank: int = 0
    alpha: float = 1.0
    targets: tuple[str, ...] = ("q", "v")


class Tokens(NamedTuple):
    """Normed output tokens: `cls` (B, D), `patches` (B, N, D); registers are in neither.

    Of a `CropGroup` that names its patches, `patches` is (M, D). A tuple, in which FSDP finds the
    tensors whose gradients announce the backward pass.
    """

    cls: Tensor
    patches: Tensor


@dataclass(frozen=True)
class CropGroup:
    """Crops of one size.

    Attributes:
        images: float (B, 3, H, W), normalised; H and W multiples of the patch.
        mask: bool (B, N), True where the patch embedding is replaced by the mask token (before the
            position embedding is added, as in DINOv2).
        drop: rows that each residual branch sees; None: all.
        patches: int64 (M,), the patches whose tokens are asked for, numbered through all crops
            (crop * N + patch); None: all. The end of the last block is run for these alone.
    """

    images: Tensor
    mask: Tensor | None = None
    drop: DropRows | None = None
    patches: Tensor | None = None


@lru_cache(maxsize=64)
def backbone_facts(
    name: str,
    kwargs: tuple[tuple[str, Any], ...] = (),
    sr: SRConfig | None = None,
    img_px: int | None = None,
    lora: LoRAChoice | None = None,
) -> BackboneFacts:
    """Sizes of a backbone, from a model without memory (meta device).

    Args:
        name: timm architecture.
        kwargs: sorted (argument, value) pairs of `timm.create_model`.
        sr: SR-attention that it is to have.
        img_px: side of the crops its position table is made for.
        lora: low-rank updates that it is to have.

    Raises:
        InputError: unknown name, arguments timm refuses, an architecture that cannot be
            pretrained, or one that cannot have SR-attention or LoRA.
    """
    with torch.device("meta"):
        made = build_backbone(name, img_px=img_px, kwargs=dict(kwargs), sr=sr, lora=lora)
    return BackboneFacts(
        patch_px=made.patch_px,
        embed_dim=made.embed_dim,
        depth=made.depth,
        is_transformer=made.is_transformer,
    )


class ViTBackbone(nn.Module):
    """A timm ViT that can see masked patches and drop residual branches for part of a batch.

    Args:
        vit: the timm model; `self.vit.state_dict()` has timm's own keys.
        checkpoint_blocks: recompute each block in the backward pass to save memory.

    Attributes:
        pack: run crops of several sizes through the blocks together (see `encode`).
        compile_backend: compile the blocks with this backend of `torch.compile`; None: do not.
    """

    is_transformer = True

    def __init__(self, vit: VisionTransformer, *, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim))
        self.checkpoint_blocks = checkpoint_blocks
        self.pack = False
        self.compile_backend: str | None = None
        for block in vit.blocks:
            attach(block)

    @property
    def model(self) -> nn.Module:
        """The timm model."""
        return self.vit

    def freeze_patches(self) -> None:
        """Keep the patch projection as it is."""
        self.vit.patch_embed.requires_grad_(False)

    def encoder_weights(self) -> dict[str, Tensor]:
        """Weights under timm's own keys, low-rank updates added in."""
        return merge_lora(self.vit) if lora_layers(self.vit) else self.vit.state_dict()

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
        """Encode crops of one size; arguments as in `CropGroup`."""
        return self._encode([CropGroup(images, mask, drop)])[0]

    def encode(self, groups: Sequence[CropGroup]) -> list[Tokens]:
        """Encode crops of several sizes; with `pack` in one pass of the blocks."""
        if self.pack:
            return self._encode(groups)
        return [self._encode([group])[0] for group in groups]

    def _encode(self, groups: Sequence[CropGroup]) -> list[Tokens]:
        embedded = [self._embed(group.images, group.mask) for group in groups]
        sizes = tuple((x.shape[0], x.shape[1]) for x in embedded)
        selections = [self._wanted(g, x) for g, x in zip(groups, embedded, strict=True)]
        wanted, counts = None, [x.shape[0] * x.shape[1] for x in embedded]
        if any(selection is not None for selection in selections):
            wanted, counts = _joint_selection(selections, counts, embedded[0].device)
        x = _in_product_type(join_groups(embedded))
        last = self.depth - 1
        for index, block in enumerate(self.vit.blocks):
            kept = _kept_by([group.drop for group in groups], index)
            x = self._block(block, x, sizes, kept, wanted if index == last else None)
        parts = self.vit.norm(x).split(counts)
        return [
            self._tokens(part, size, chosen is not None)
            for part, size, chosen in zip(parts, sizes, selections, strict=True)
        ]

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens before the first block, (B, T, D)."""
        x = cast(Tensor, self.vit.patch_embed(images))
        if mask is not None:
            x = torch.where(mask.view(*x.shape[:-1], 1), self.mask_token.to(x.dtype), x)
        return self.vit.norm_pre(self.vit.patch_drop(add_positions(self.vit, x)))

    def _wanted(self, group: CropGroup, x: Tensor) -> Tensor | None:
        """Rows of a group that are asked for: class tokens, then the named patches."""
        if group.patches is None:
            return None
        crops, tokens = x.shape[:2]
        prefix = self.vit.num_prefix_tokens
        cls = torch.arange(0, crops * tokens, tokens, device=x.device)
        crop = group.patches.div(tokens - prefix, rounding_mode="floor")
        return torch.cat([cls, group.patches + prefix * (crop + 1)])

    def _tokens(self, x: Tensor, size: tuple[int, int], selected: bool) -> Tokens:
        if selected:
            return Tokens(x[: size[0]], x[size[0] :])
        x = x.unflatten(0, size)
        return Tokens(x[:, 0], x[:, self.vit.num_prefix_tokens :])

    def _block(
        self,
        block: nn.Module,
        x: Tensor,
        sizes: Sizes,
        kept: tuple[Kept, Kept] | None,
        wanted: Tensor | None,
    ) -> Tensor:
        arguments = (x, sizes, kept, wanted, self.compile_backend)
        run = cast(Callable[..., Tensor], block.residual)
        if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(run, *arguments, use_reentrant=False))
        return run(*arguments)


Backbone: TypeAlias = "ViTBackbone | ConvBackbone"


def _in_product_type(x: Tensor) -> Tensor:
    """The tokens between blocks in the type of the products, as DINOv2 and DINOv3 keep them."""
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind):  # no data, no autocast
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _kept_by(drops: Sequence[DropRows | None], index: int) -> tuple[Kept, Kept] | None:
    """What the two branches of a block keep of each group; groups drop all together or not."""
    known = [drop for drop in drops if drop is not None]
    if not known:
        return None
    assert len(known) == len(drops)
    attention, mlp = (
        [(drop.rows[index][branch], drop.scale) for drop in known] for branch in (0, 1)
    )
    return attention, mlp


def _joint_selection(
    selections: Sequence[Tensor | None], rows: Sequence[int], device: torch.device
) -> tuple[Tensor, list[int]]:
    """Selections of each group as one of the joined rows, and how many rows each has."""
    parts, start = [], 0
    for selection, count in zip(selections, rows, strict=True):
        own = torch.arange(count, device=device) if selection is None else selection
        parts.append(own + start)
        start += count
    return torch.cat(parts), [len(part) for part in parts]


def build_backbone(
    name: str,
    *,
    img_px: int | None,
    pretrained: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    sr: SRConfig | None = None,
    lora: LoRAChoice | None = None,
    checkpoint_blocks: bool = False,
) -> Backbone:
    """Build a backbone; random weights come from torch's global generator.

    Args:
        name: timm architecture, with or without a weight tag, or `hf-hub:OWNER/MODEL`.
        img_px: side of the crops for which the position table is made (others are resampled).
        pretrained: load timm's published weights.
        weights: weights to start from instead, see `cytoray.models.starting_weights`; relative
            position tables that they do not have stay zero.
        kwargs: further arguments of `timm.create_model`.
        sr: SR-attention in place of the plain one.
        lora: train low-rank updates alone.
        checkpoint_blocks: recompute the blocks in the backward pass.

    Raises:
        InputError: unknown name or arguments, weights that do not fit, or a part that the
            architecture cannot have.
    """
    from cytoray.models.conv_backbone import ConvBackbone
    from cytoray.models.rotary_backbone import RotaryBackbone

    model = create_model(name, img_px=img_px, pretrained=pretrained, kwargs=kwargs or {})
    if sr is not None:
        use_sr(model, **dataclasses.asdict(sr))
    if weights is not None:
        load_start(model, weights, name)
    if lora is not None and lora.rank:
        add_lora(model, lora.rank, lora.targets, lora.alpha, dropout=0.0)
    kind: Any = ViTBackbone
    if not isinstance(model, VisionTransformer):
        kind = RotaryBackbone if isinstance(model, Eva) else ConvBackbone
    return kind(model, checkpoint_blocks=checkpoint_blocks)


def default_drop_path(embed_dim: int) -> float:
    """Drop path that fits a width: 0.3 from 1024 (ViT-L), 0.1 from 768 (ViT-B), else none."""
    return 0.3 if embed_dim >= 1024 else 0.1 if embed_dim >= 768 else 0.0
