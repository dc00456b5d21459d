"""A pre-norm block over crops of several sizes, laid end to end as one sequence of tokens.

Norms and linear layers know nothing of crops: one call serves all of them. Attention is within a
crop, one call for each size. Shapes: a group of n crops of T tokens has n * T rows; N rows of all
groups, D width, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cytoray.compilation import compiled
from cytoray.models.projection_parts import projection_parts
from cytoray.models.sr_transformer import SRAttention

Sizes = tuple[tuple[int, int], ...]  # (crops n, tokens T) of each group, in their order
Kept = Sequence[tuple[Tensor, float]]  # crops of each group a branch sees, and its factor


def attach(block: nn.Module) -> None:
    """Give a block of a timm ViT the method `residual`; its parameters keep their names.

    As a method of the block, FSDP can put its parameters together when it runs.
    """
    block.residual = MethodType(residual, block)  # type: ignore[assignment]


def residual(
    block: Any,
    x: Tensor,
    sizes: Sizes,
    kept: tuple[Kept, Kept] | None = None,
    wanted: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The block with batch-subset drop path (DINOv2), on the rows of several groups.

    x[r] += factor * branch(x[r]) for the crops r a branch keeps: the others cost nothing, and with
    factor = crops / kept crops the expectation over random choices is the plain block.

    Args:
        block: a timm block with norm1, attn, ls1, norm2, mlp, ls2; any other is simply called.
        x: float (N, D).
        sizes: of the groups.
        kept: what attention and MLP see; None: all.
        wanted: int64 (M,), rows that are returned; None: all. The MLP runs on no others.
        backend: compile the pass with this backend of `torch.compile`; None: do not.

    Returns:
        float (N, D) or (M, D).
    """
    if backend is None:
        return _residual(block, x, sizes, kept, wanted)
    if wanted is not None:  # as many rows as patches are masked, other at each step
        torch._dynamo.maybe_mark_dynamic(wanted, 0)
    # How many crops a branch keeps changes with the step; without drop path there are as many
    # shapes as sizes of crops, and code of fixed shape is faster.
    # One function for all blocks: they differ in parameters only, so that the code made for the
    # first serves the others.
    run = compiled(_residual, backend, dynamic=kept is not None)
    return run(block, x, sizes, kept, wanted)


def _residual(
    block: Any, x: Tensor, sizes: Sizes, kept: tuple[Kept, Kept] | None, wanted: Tensor | None
) -> Tensor:
    if kept is None and type(block) is not Block:
        # Not the block itself: hooks (FSDP's) surround this pass, and shall not run twice.
        x = _by_group(block.forward, x, sizes)
        return x if wanted is None else x.index_select(0, wanted)

    def attend(rows: Tensor, groups: Sizes) -> Tensor:
        return block.ls1(_attention(block.attn, block.norm1(rows), groups))

    def transform(rows: Tensor, groups: Sizes) -> Tensor:
        return block.ls2(block.mlp(block.norm2(rows)))

    if kept is None:
        x = x + attend(x, sizes).to(x.dtype)
        if wanted is not None:
            x = x.index_select(0, wanted)
        return x + transform(x, sizes).to(x.dtype)
    x = _on_kept(attend, x, sizes, kept[0])
    x = _on_kept(transform, x, sizes, kept[1])
    return x if wanted is None else x.index_select(0, wanted)


def _on_kept(
    branch: Callable[[Tensor, Sizes], Tensor], x: Tensor, sizes: Sizes, kept: Kept
) -> Tensor:
    """x + factor * branch, where the branch sees the kept crops of each group only."""
    groups = split_groups(x, sizes)
    chosen = [g.index_select(0, rows) for g, (rows, _) in zip(groups, kept, strict=True)]
    kept_sizes = tuple((len(part), part.shape[1]) for part in chosen)
    out = split_groups(branch(join_groups(chosen), kept_sizes).to(x.dtype), kept_sizes)
    return join_groups(
        [
            group.index_add(0, rows, part, alpha=factor)
            for group, part, (rows, factor) in zip(groups, out, kept, strict=True)
        ]
    )


def split_groups(x: Tensor, sizes: Sizes) -> list[Tensor]:
    """Rows (N, D) as one (n, T, D) a group."""
    parts = x.split([crops * tokens for crops, tokens in sizes])
    return [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]


def join_groups(groups: Sequence[Tensor]) -> Tensor:
    """Groups (n, T, D) as rows (N, D); one group is not copied."""
    rows = [group.flatten(0, 1) for group in groups]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _by_group(run: Callable[[Tensor], Tensor], x: Tensor, sizes: Sizes) -> Tensor:
    return join_groups([run(group) for group in split_groups(x, sizes)])


def _attention(attn: Any, x: Tensor, sizes: Sizes) -> Tensor:
    """timm's attention, or SR-attention in its place, with one projection for all groups.

    Another kind goes group by group.
    """
    if not _projects_rows(attn):
        return _by_group(attn, x, sizes)
    mix = getattr(attn, "mix", None)  # of SR-attention
    rows = attn.qkv(x)
    done = []
    if mix is not None:
        for group in split_groups(rows, sizes):
            qkv = group.unflatten(-1, (3, attn.num_heads, -1))
            done.append(mix(attn.normed(qkv)).flatten(2))
    else:
        dropped = attn.attn_drop.p if attn.training else 0.0
        for q, k, v in projection_parts(rows, sizes, attn.num_heads):
            q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
            done.append(_weighted_values(q, k, v, dropped).transpose(1, 2).flatten(2))
    out = attn.norm(join_groups(done))
    gate = getattr(attn, "gate", None)  # SR-attention has none of the parts that were None
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _projects_rows(attn: Any) -> bool:
    """Whether queries, keys and values are one linear layer of the tokens, and no more is asked."""
    return type(attn) is Attention or (isinstance(attn, SRAttention) and attn.is_plain)


def _weighted_values(q: Tensor, k: Tensor, v: Tensor, dropped: float) -> Tensor:
    """Scaled dot-product attention (n, H, T, d).

    PyTorch's fused attention takes three to ten times as long as its parts where a CPU runs the
    crops of an image in bf16 (its backward pass works on one small matrix at a time).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not dropped:
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropped)
