"""LESS (Zhao et al. 2024): two scales of a bag through a CrossViT without position embedding.

Each scale has its own class token and blocks of full self-attention; then the class token of one
scale attends to the other's instances. Bags lie end to end, a bag's class token before its
instances. Shapes: B bags, R rows of all bags together, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytoray.errors import InputError
from cytoray.mil.base import Aggregator, MILOutput
from cytoray.mil.dropout import Dropout
from cytoray.mil.folding import fold_query, unfold_values
from cytoray.mil.packing import PackedBags, TokenRows, prepend_tokens
from cytoray.models.linear import Linear


class SelfBlock(nn.Module):
    """A pre-norm transformer block; attention stays within each bag.

    Args:
        dim: D.
        heads: H.
        dropout: on both branches.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = Linear(dim, 3 * dim), Linear(dim, dim)
        self.mlp = nn.Sequential(Linear(dim, 4 * dim), nn.GELU(), Linear(4 * dim, dim))
        self.dropout = Dropout(dropout)

    def forward(self, x_rd: Tensor, sizes: list[int]) -> Tensor:
        """Rows (R, D) of bags of `sizes` rows, to the same shape."""
        qkv = self.qkv(self.norm1(x_rd)).unflatten(-1, (3, self.heads, -1))
        answers = [
            F.scaled_dot_product_attention(*part.permute(1, 2, 0, 3)[:, None]).squeeze(0)
            for part in qkv.split(sizes)
        ]
        attended_rd = torch.cat([answer.transpose(0, 1).flatten(1) for answer in answers])
        x_rd = x_rd + self.dropout(self.out(attended_rd))
        return x_rd + self.dropout(self.mlp(self.norm2(x_rd)))


class CrossAttention(nn.Module):
    """A class token attends to itself and to the instances of the other scale.

    Args:
        dim: D.
        heads: H.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.enter = nn.Sequential(nn.LayerNorm(dim), nn.GELU(), nn.Linear(dim, dim))
        self.leave = nn.Sequential(nn.LayerNorm(dim), nn.GELU(), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)
        self.query, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, class_bd: Tensor, other_rd: Tensor, rows: TokenRows
    ) -> tuple[Tensor, list[Tensor]]:
        """Update class tokens from the other scale.

        Args:
            class_bd: (B, D), this scale's class tokens.
            other_rd: (R, D), the other scale's rows; its own class tokens are left out.
            rows: how the other scale's bags lie.

        Returns:
            (B, D), and for each bag the attention (N,) to its instances, detached, mean over heads.
        """
        entered_bd = self.enter(class_bd)
        token_rows = rows.token_rows[:, 0]
        normed_rd = self.norm(other_rd.index_copy(0, token_rows, entered_bd))
        query_bd = self.query(normed_rd[token_rows])
        asked_bhd = fold_query(query_bd, self.key.weight, self.heads)
        contexts, attention = [], []
        for asked_hd, normed in zip(asked_bhd, normed_rd.split(rows.sizes), strict=True):
            weights_hr = (asked_hd @ normed.T).softmax(dim=-1)
            contexts.append(weights_hr @ normed)
            attention.append(weights_hr.detach().float().mean(dim=0)[1:])
        answer_bd = unfold_values(torch.stack(contexts), self.value.weight) + self.value.bias
        return self.leave(entered_bd + self.out(answer_bd)), attention


class TwoScaleBlock(nn.Module):
    """Self-attention blocks on each scale, then each class token looks at the other scale.

    Args:
        dim: D.
        heads: H.
        depths: self-attention blocks of the fine and of the coarse scale.
        dropout: of the self-attention blocks.
    """

    def __init__(self, dim: int, heads: int, depths: tuple[int, int], dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(SelfBlock(dim, heads, dropout) for _ in range(depth)) for depth in depths
        )
        self.cross = nn.ModuleList(CrossAttention(dim, heads) for _ in range(2))

    def forward(
        self, scales: list[Tensor], rows: list[TokenRows]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Rows (R_i, D) of both scales to the same, and the attention each scale's bags get."""
        after = []
        for x_rd, lie, blocks in zip(scales, rows, self.blocks, strict=True):
            for block in blocks:  # type: ignore[union-attr]
                x_rd = block(x_rd, lie.sizes)
            after.append(x_rd)
        updated, attention = [], [[], []]
        for scale, other in ((0, 1), (1, 0)):
            token_rows = rows[scale].token_rows[:, 0]
            class_bd, attention[other] = self.cross[scale](
                after[scale][token_rows], after[other], rows[other]
            )
            updated.append(after[scale].index_copy(0, token_rows, class_bd))
        return updated, attention


class LESS(Aggregator):
    """LESS's slide-level part: CrossViT over two scales of a bag, mean of the scales' logits.

    The second scale is given as `coarse`, e.g. larger tiles, or `cytoray.mil.coarsen` of the bag;
    without it, both branches see the same bag. `MILOutput.attention` is what the coarse class
    token pays the fine instances in the last block; `aux["coarse_attention"]` (T2,) the reverse.

    Args:
        in_dim: width of the instance features, at both scales.
        num_classes: C, or one C for each task.
        hidden_dim: D, a multiple of `heads`.
        heads: H.
        num_blocks: two-scale blocks.
        fine_depth, coarse_depth: self-attention blocks of a scale in each of them.
        dropout: of the self-attention blocks.
    """

    num_scales: ClassVar = 2
    optimizer_defaults: ClassVar = {"lr": 1e-6, "weight_decay": 0.1, "max_instances": 100}

    def __init__(
        self,
        in_dim: int,
        num_classes: int | Sequence[int],
        *,
        hidden_dim: int = 256,
        heads: int = 16,
        num_blocks: int = 3,
        fine_depth: int = 1,
        coarse_depth: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_dim, num_classes)
        if hidden_dim % heads:
            raise InputError(f"hidden_dim {hidden_dim} is not a multiple of heads {heads}")
        self.embeds = nn.ModuleList(Linear(in_dim, hidden_dim) for _ in range(2))
        self.class_tokens = nn.Parameter(0.02 * torch.randn(2, hidden_dim))
        self.blocks = nn.ModuleList(
            TwoScaleBlock(hidden_dim, heads, (fine_depth, coarse_depth), dropout)
            for _ in range(num_blocks)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(hidden_dim, self.num_logits) for _ in range(2))

    def aggregate(self, features: Tensor, offsets: Tensor, ids: Tensor) -> MILOutput:
        """See `Aggregator.aggregate`: the same bags at both scales."""
        return self.aggregate_scales(features, offsets, ids, PackedBags(features, offsets))

    def aggregate_scales(
        self, features: Tensor, offsets: Tensor, ids: Tensor, coarse: PackedBags
    ) -> MILOutput:
        """See `Aggregator.aggregate_scales`."""
        scales, rows = [], []
        for index, packed in enumerate((PackedBags(features, offsets), coarse)):
            embedded_td = self.embeds[index](packed.features)
            token_1d = self.class_tokens[index : index + 1]
            x_rd, lie = prepend_tokens(token_1d, embedded_td, packed.offsets)
            scales.append(x_rd)
            rows.append(lie)
        attention: list[list[Tensor]] = [[], []]
        for block in self.blocks:
            scales, attention = block(scales, rows)
        logits = [
            head(norm(x_rd[lie.token_rows[:, 0]]))
            for x_rd, lie, norm, head in zip(scales, rows, self.norms, self.heads, strict=True)
        ]
        fine, second = (torch.cat([part / part.sum() for part in parts]) for parts in attention)
        return MILOutput(torch.stack(logits).mean(dim=0), fine, {"coarse_attention": second})
