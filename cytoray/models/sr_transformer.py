"""SR-Transformer (Cyto-SSL): SR-attention in place of the attention of any timm ViT.

Shapes: B batch, H heads, N tokens, D width, d width of a head, K buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeVar, cast

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from cytoray.errors import InputError, raise_problems
from cytoray.models.irpe import NUM_BUCKETS, Grid, PatchGrids
from cytoray.models.sr_attention import fast_sr_attention, kernels_serve, sr_attention
from cytoray.models.sr_kernel_ops import attend_by_kernels

SR_TABLES = ("rel_k", "rel_q", "rel_v")  # parameters that a timm attention does not have
FORMS = ("auto", "torch", "plain")
REPLACEABLE = (Attention, AttentionRope, EvaAttention)
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class SRConfig:
    """The two parts of the SR-Transformer, each on or off; the fields are arguments of `use_sr`.

    Attributes:
        sparse: each query attends to its `top_h` best keys only.
        irpe: learnt relative positions on queries, keys and values.
        top_h: keys a query keeps (Cyto-SSL: 16).
        per_head: relative positions of each head's own, else shared over the heads of a block.
        form: how it is computed; all are equal. `auto`: Triton kernels where they serve (CUDA),
            else PyTorch operations; `torch`: always those; `plain`: the definition, slow.

    Raises:
        InputError: `top_h` below 1, or no such form.
    """

    sparse: bool = False
    irpe: bool = False
    top_h: int = 16
    per_head: bool = False
    form: Literal["auto", "torch", "plain"] = "auto"

    def __post_init__(self) -> None:
        problems = []
        if self.top_h < 1:
            problems.append(f"top_h is {self.top_h}; a query must keep at least 1 key")
        if self.form not in FORMS:
            problems.append(f"form {self.form!r} is none of {', '.join(FORMS)}")
        raise_problems("the SR-Transformer cannot be used so", problems)

    @property
    def is_on(self) -> bool:
        """Whether a model is changed at all."""
        return self.sparse or self.irpe


class SRAttention(nn.Module):
    """A timm attention whose scores and values know relative positions, and which keeps the top h.

    It takes over the parts of the attention it replaces under their own names, so that a state
    dict has timm's keys and, with `irpe`, `rel_k`, `rel_q` and `rel_v`: float (K, d), or (H, K, d)
    with `per_head`; zero at first, when the output is that of the plain attention for h >= N.

    Args:
        attention: timm `Attention`, `AttentionRope` or `EvaAttention`.
        grids: shared by the blocks of a model.
        config: which parts are on.
    """

    rel_k: nn.Parameter | None
    rel_q: nn.Parameter | None
    rel_v: nn.Parameter | None

    def __init__(self, attention: nn.Module, grids: PatchGrids, config: SRConfig) -> None:
        super().__init__()
        source = cast(Any, attention)
        for name, child in source.named_children():
            self.add_module(name, child)
        for name, parameter in source.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in source.named_buffers(recurse=False):
            persistent = name not in source._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        self.num_heads: int = source.num_heads
        self.head_dim: int = source.head_dim
        self.scale: float = source.scale
        self.kv_groups: int = getattr(source, "num_kv_groups", 1)
        self.rotate_half: bool = getattr(source, "rotate_half", False)
        self.is_fused = source.qkv is not None
        self.has_separate_bias = getattr(source, "q_bias", None) is not None
        self.has_gate = source.gate is not None
        self.is_plain = type(source) is Attention
        self.grids = grids
        self.config = config
        shape = (NUM_BUCKETS, self.head_dim)
        if config.per_head:
            shape = (self.num_heads, *shape)
        like = source.proj.weight
        for name in SR_TABLES:
            table = nn.Parameter(like.new_zeros(shape)) if config.irpe else None
            self.register_parameter(name, table)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend; arguments and result are those of the replaced attention.

        Args:
            x: float (B, N, D).
            rope: rotary embedding of the patches, where the model has one.
            attn_mask: bool or float, as in `sr_attention`; such a call takes the slow form.
            is_causal: not supported.

        Raises:
            InputError: `is_causal`, or tokens of unknown grid (see `PatchGrids.of`).
        """
        if is_causal:
            raise InputError("SR-attention lets every patch see all others; is_causal must be off")
        out = self.mix(self.project(x, rope), attn_mask).flatten(2)
        parts = cast(Any, self)
        out = parts.norm(out)
        if self.has_gate:
            out = out * parts.gate(x).sigmoid()
        return parts.proj_drop(parts.proj(out))

    def mix(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend, without the layers before and after: (B, N, 3, H, d) to (B, N, H, d).

        Raises:
            InputError: tokens of unknown grid.
        """
        tokens = qkv.shape[1]
        grids = self.grids.of(tokens) if self.config.irpe else self.grids.noted(tokens)
        return self._attend(qkv, grids, mask)

    def project(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """Queries, keys and values (B, N, 3, H, d) of x (B, N, D), in one type."""
        parts = cast(Any, self)
        if self.is_fused:
            qkv = parts.qkv(x)
            if self.has_separate_bias:
                qkv = qkv + torch.cat([parts.q_bias, parts.k_bias, parts.v_bias]).to(qkv.dtype)
            qkv = self.normed(qkv.unflatten(-1, (3, self.num_heads, -1)))
            if rope is None:
                return qkv
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            projections = (parts.q_proj, parts.k_proj, parts.v_proj)
            q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
            q, k = parts.q_norm(q), parts.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope), self._rotate(k, rope)
        if self.kv_groups > 1:
            k, v = (t.repeat_interleave(self.kv_groups, dim=1) for t in (k, v))
        return torch.stack([t.to(v.dtype).transpose(1, 2) for t in (q, k, v)], dim=2)

    def normed(self, qkv: Tensor) -> Tensor:
        """Queries and keys (B, N, 3, H, d) after their norms; itself where there are none."""
        parts = cast(Any, self)
        norms = (parts.q_norm, parts.k_norm)
        if all(isinstance(norm, nn.Identity) for norm in norms):
            return qkv
        q, k, v = qkv.unbind(2)
        return torch.stack([norms[0](q).to(v.dtype), norms[1](k).to(v.dtype), v], dim=2)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix = self.grids.num_prefix
        patches = apply_rot_embed_cat(x[:, :, prefix:], rope, half=self.rotate_half)
        return torch.cat([x[:, :, :prefix], patches], dim=2)

    def _attend(self, qkv: Tensor, grids: tuple[Grid, ...] | None, mask: Tensor | None) -> Tensor:
        if grids is None or len(grids) == 1:
            return self._attend_crop(qkv, grids[0] if grids else None, mask)
        if mask is not None:
            raise InputError("crops packed in one sequence attend to themselves; give no attn_mask")
        done, start = [], 0
        for grid, alike in groupby(grids):
            count, tokens = len(list(alike)), self.grids.tokens_of(grid)
            stop = start + count * tokens
            crops = qkv[:, start:stop].unflatten(1, (count, tokens)).flatten(0, 1)
            out = self._attend_crop(crops, grid, None)
            done.append(out.unflatten(0, (-1, count)).flatten(1, 2))
            start = stop
        return torch.cat(done, dim=1)

    def _attend_crop(self, qkv: Tensor, grid: Grid | None, mask: Tensor | None) -> Tensor:
        top_h = self.config.top_h if self.config.sparse else None
        tables = (self.rel_k, self.rel_q, self.rel_v)
        buckets = None
        if grid is not None and self.config.irpe:
            buckets = self.grids.buckets(grid, qkv.device, qkv.dtype)
        plain = mask is not None or self.config.form == "plain"
        more = self.config.irpe or (top_h is not None and top_h < qkv.shape[1])  # than SDPA does
        if more and not plain and self.config.form == "auto" and kernels_serve(qkv):
            maps = None if buckets is None else buckets.kernel
            return attend_by_kernels(qkv, *tables, maps, top_h, self.scale)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if plain:
            index = None if buckets is None else buckets.index
            out = sr_attention(q, k, v, *tables, index, top_h, self.scale, mask)
        else:
            maps = None if buckets is None else buckets.maps
            out = fast_sr_attention(q, k, v, *tables, maps, top_h, self.scale)
        return out.transpose(1, 2)


def use_sr(
    vit: Model,
    *,
    top_h: int = 16,
    irpe: bool = True,
    sparse: bool = True,
    per_head: bool = False,
    form: Literal["auto", "torch", "plain"] = "auto",
) -> Model:
    """Replace the attention of every block of a timm ViT by SR-attention, in place.

    Absolute position embeddings stay (Cyto-SSL keeps both). No random number is drawn, and with
    `irpe` alone the outputs do not change until the tables are trained.

    Args:
        vit: a timm VisionTransformer or Eva (DINOv3 and other ViTs with rotary positions).
        top_h: keys a query keeps.
        irpe: relative positions on queries, keys and values.
        sparse: keep the `top_h` best keys only.
        per_head: tables for each head instead of each block.
        form: see `SRConfig`.

    Returns:
        `vit`; unchanged if neither `irpe` nor `sparse`.

    Raises:
        InputError: a model without global attention over patches (it says why), attention or patch
            dropout, one that has SR-attention already, or `top_h` below 1.
    """
    config = SRConfig(sparse=sparse, irpe=irpe, top_h=top_h, per_head=per_head, form=form)
    if not config.is_on:
        return vit
    raise_problems(
        f"the SR-Transformer cannot be used with {type(vit).__name__}", _obstacles(vit, irpe)
    )
    model = cast(Any, vit)
    grids = PatchGrids(model.num_prefix_tokens)
    for block in model.blocks:
        block.attn = SRAttention(block.attn, grids, config)
        block.attn.train(block.training)
    model.patch_embed.register_forward_pre_hook(grids)
    return vit


def sr_config(vit: nn.Module) -> SRConfig | None:
    """How `use_sr` has changed a model; None if it has not."""
    found = (m.config for m in vit.modules() if isinstance(m, SRAttention))
    return next(found, None)


def _obstacles(vit: Any, irpe: bool) -> list[str]:
    """What keeps a model from having SR-attention."""
    if sr_config(vit) is not None:
        return ["it has SR-attention already"]
    if not any("attn" in name for name, _ in vit.named_modules()):
        return ["it has no attention; take a timm ViT such as vit_small_patch16_224"]
    embedding = getattr(vit, "patch_embed", None)
    attentions: list[Any] = [getattr(b, "attn", None) for b in getattr(vit, "blocks", ())]
    if (
        not attentions
        or None in attentions
        or not hasattr(vit, "num_prefix_tokens")
        or not hasattr(embedding, "dynamic_feat_size")
    ):
        return [
            "its blocks do not relate all patches of one image grid to each other (some see "
            "windows or merged patches only); take a timm ViT such as vit_small_patch16_224"
        ]
    kinds = {type(attention) for attention in attentions}
    problems = [
        f"its attention {kind.__name__} scores tokens in a way of its own; take a timm ViT with "
        "the standard attention, such as vit_small_patch16_224"
        for kind in sorted(kinds - set(REPLACEABLE), key=lambda kind: kind.__name__)
    ]
    if not problems and any(attention.attn_drop.p for attention in attentions):
        problems.append("it drops attention weights; build it with attn_drop_rate=0")
    if irpe and getattr(getattr(vit, "patch_drop", None), "prob", 0.0):
        problems.append(
            "patches dropped at random lose their places; build it with patch_drop_rate=0"
        )
    return problems
