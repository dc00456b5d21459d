"""timm's EVA class as backbone: DINOv3 and other ViTs with rotary positions.

Shapes: B crops, T tokens, D width, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from cytoray.models.backbones import CropGroup, Tokens, ViTBackbone
from cytoray.models.block_pass import Kept, Sizes, residual
from cytoray.models.position_table import add_rotary_positions


class RotaryTable:
    """Rotary embeddings by number of tokens: blocks see tokens only.

    All are remembered, since activation checkpointing runs a block again when crops of another
    size have passed since.

    Args:
        per_block: each block has an embedding of its own.
    """

    def __init__(self, *, per_block: bool) -> None:
        self.per_block = per_block
        self._known: dict[int, Tensor | None] = {}

    def note(self, tokens: int, embedding: Tensor | None) -> None:
        """Let sequences of `tokens` have this embedding, float (T - prefix, 2 d) or one a block."""
        self._known[tokens] = embedding

    def of(self, tokens: int, block: int) -> Tensor | None:
        """What block number `block` is given with `tokens` tokens."""
        found = self._known[tokens]
        return found if found is None or not self.per_block else found[block]


class _TimmNames:
    """An EVA block under the names of timm's plain block, at one place of the model."""

    def __init__(self, block: Any, table: RotaryTable, index: int) -> None:
        self._block, self._table, self._index = block, table, index
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp

    def forward(self, x: Tensor) -> Tensor:
        return self._block.forward(x, rope=self._table.of(x.shape[1], self._index))

    def attn(self, x: Tensor) -> Tensor:
        return self._block.attn(x, rope=self._table.of(x.shape[1], self._index))

    def ls1(self, x: Tensor) -> Tensor:
        return x if self._block.gamma_1 is None else x * self._block.gamma_1

    def ls2(self, x: Tensor) -> Tensor:
        return x if self._block.gamma_2 is None else x * self._block.gamma_2


def rotary_residual(
    block: Any,
    x: Tensor,
    sizes: Sizes,
    kept: tuple[Kept, Kept] | None = None,
    wanted: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`cytoray.models.block_pass.residual` of an EVA block, attention crop size by crop size."""
    del backend  # the parts of the block are compiled, see `RotaryBackbone`
    named = _TimmNames(block, block.rotary_table, block.rotary_index)
    return residual(named, x, sizes, kept, wanted)


class RotaryBackbone(ViTBackbone):
    """As `ViTBackbone`, for timm's `Eva`; arguments and attributes are the same.

    With `compile_backend`, attention and MLP of each block are compiled.
    """

    def __init__(self, vit: nn.Module, *, checkpoint_blocks: bool = False) -> None:
        super().__init__(vit, checkpoint_blocks=checkpoint_blocks)  # type: ignore[arg-type]
        self._are_compiled = False
        self.table = RotaryTable(per_block=bool(getattr(vit, "rope_mixed", False)))
        for index, block in enumerate(self.vit.blocks):
            block.rotary_table, block.rotary_index = self.table, index  # type: ignore[assignment]
            block.residual = MethodType(rotary_residual, block)  # type: ignore[assignment]

    def _encode(self, groups: Sequence[CropGroup]) -> list[Tokens]:
        if self.compile_backend is not None and not self._are_compiled:
            for block in self.vit.blocks:
                for part in (block.attn, block.mlp):
                    cast(nn.Module, part).compile(backend=self.compile_backend)
            self._are_compiled = True
        return super()._encode(groups)

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        vit: Any = self.vit
        x = vit.patch_embed(images)
        if mask is not None:
            x = torch.where(mask.view(*x.shape[:-1], 1), self.mask_token.to(x.dtype), x)
        x, embedding = add_rotary_positions(vit, x)
        self.table.note(x.shape[1], embedding)
        return vit.norm_pre(x)
