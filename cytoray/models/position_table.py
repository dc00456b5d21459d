"""Absolute position embeddings on crops of any size, resampled by a matrix product.

Interpolation is linear in what it interpolates: its weights depend on the two grids alone. As a
product its gradient needs no atomic additions, which on CUDA PyTorch refuses where every kernel is
to be deterministic.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Grid = tuple[int, int]  # rows and columns of patches


@lru_cache(maxsize=64)
def _weights(old: Grid, new: Grid, device: torch.device) -> Tensor:
    """float32 (new patches, old patches): timm's bicubic interpolation with antialiasing."""
    count = old[0] * old[1]
    # Real numbers, also when a model is run without any to count what it costs.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        each = torch.eye(count, device="cpu").view(1, count, *old)
        made = F.interpolate(each, size=new, mode="bicubic", antialias=True)
        return made.view(count, -1).mT.contiguous().to(device)


def resample_positions(table: Tensor, old: Grid, new: Grid, num_prefix: int) -> Tensor:
    """A position table for another grid, as timm's `resample_abs_pos_embed` makes it.

    Args:
        table: float (1, num_prefix + old patches, D).
        old: its grid.
        new: the grid wanted.
        num_prefix: rows in front that stand for no patch.

    Returns:
        (1, num_prefix + new patches, D), of the table's type.
    """
    if old == new:
        return table
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    exactly = nullcontext() if table.is_meta else torch.autocast(table.device.type, enabled=False)
    with exactly:
        made = _weights(old, new, table.device) @ patches[0].float()
    return torch.cat([prefix, made.to(table.dtype).unsqueeze(0)], dim=1)


def add_positions(vit: VisionTransformer, x: Tensor) -> Tensor:
    """timm's `_pos_embed`: class and register tokens put in front, positions added.

    A model with a way of its own is given to that.

    Args:
        vit: the model.
        x: float (B, H, W, D), embedded patches.

    Returns:
        (B, T, D).
    """
    own_way = type(vit)._pos_embed is not VisionTransformer._pos_embed
    if own_way or not _is_resampled(vit):
        return cast(Tensor, vit._pos_embed(x))
    return _add_table(vit, x)


def add_rotary_positions(vit: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """As `add_positions`, for timm's `Eva`.

    Returns:
        (B, T, D), and what `vit.rope` gives for the grid (None: it has no rotary positions).
    """
    if not _is_resampled(vit) or vit.patch_drop is not None:
        return cast(tuple[Tensor, Tensor | None], vit._pos_embed(x))
    rotary = None if vit.rope is None else vit.rope.get_embed(shape=tuple(x.shape[1:3]))
    return _add_table(vit, x), rotary


def _is_resampled(vit: Any) -> bool:
    """Whether the model has a table of positions, and fits it to the size of a crop."""
    return vit.pos_embed is not None and vit.dynamic_img_size


def _add_table(vit: Any, x: Tensor) -> Tensor:
    """Tokens put in front, and the model's table for the grid of `x` (B, H, W, D) added."""
    count, height, width, _ = x.shape
    num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    old = cast(Grid, tuple(vit.patch_embed.grid_size))
    table = resample_positions(vit.pos_embed, old, (height, width), num_prefix)
    tokens = [t.expand(count, -1, -1) for t in (vit.cls_token, vit.reg_token) if t is not None]
    x = x.flatten(1, 2)
    if vit.no_embed_class:
        x = torch.cat([*tokens, x + table], dim=1)
    else:
        x = torch.cat([*tokens, x], dim=1) + table
    return cast(Tensor, vit.pos_drop(x))
