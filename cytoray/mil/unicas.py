"""UniCAS multi-task aggregator (eq. 1-5): task tokens that attend to their top-m patches, soft MoE.

A bag's rows are its task tokens, then its patch tokens; bags lie end to end.
Shapes: B bags, R rows of all bags together, K tasks, H heads, Q = K * H, S slots.

A task token is one query, so keys and values are never formed (see `cytoray.mil.folding`): apart
from the m patches a task keeps, a block costs O(R D (K + S)) instead of O(R D^2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytoray.errors import InputError
from cytoray.mil.base import Aggregator, MILOutput
from cytoray.mil.folding import fold_query, unfold_values
from cytoray.mil.packing import TokenRows, prepend_tokens, segment_sum
from cytoray.mil.transmil import PPEG
from cytoray.models.linear import Linear

RELEASED_DIM, RELEASED_HEADS = 768, 12


def top_m_mask(scores_qn: Tensor, m: int) -> Tensor:
    """Which scores are among the m largest of their row: (Q, N) bool (eq. 1).

    Scores equal to the m-th largest are all kept, so that the answer does not hang on the order
    of the instances; a row of m or fewer keeps everything.
    """
    if scores_qn.shape[1] <= m:
        return torch.ones_like(scores_qn, dtype=torch.bool)
    threshold = scores_qn.detach().topk(m, dim=1).values[:, -1:]
    return scores_qn >= threshold


class TaskAttention(nn.Module):
    """Task-specific attention (eq. 1-2).

    Keys and values are shared by the tasks. A task's patch tokens outside its top m are zeroed,
    and the rest, with the updated task token, go through the task's own projection; it has no
    bias, so that a zeroed token stays zero. The projected patches are summed over the tasks.

    Args:
        dim: D.
        num_tasks: K.
        top_m: m, patches a task (and head) attends to.
        heads: H, a divisor of `dim`.
    """

    def __init__(self, dim: int, num_tasks: int, *, top_m: int = 256, heads: int = 1) -> None:
        super().__init__()
        self.num_tasks, self.top_m, self.heads = num_tasks, top_m, heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.project = nn.ModuleList(Linear(dim, dim, bias=False) for _ in range(num_tasks))

    def forward(self, x_rd: Tensor, normed_rd: Tensor, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """Add the attention's answer to `x_rd`.

        Args:
            x_rd: (R, D) the residual stream.
            normed_rd: (R, D) its layer norm.
            rows: how the bags lie.

        Returns:
            (R, D), and the attention (R, K) float32, detached: mean over heads, 0 on task tokens.
        """
        query_bkd = self.query(normed_rd[rows.token_rows])
        asked_bqd = fold_query(query_bkd, self.key.weight, self.heads).flatten(1, 2)
        contexts, kept, attention = [], [], []
        for normed, asked_qd in zip(normed_rd.split(rows.sizes), asked_bqd, strict=True):
            scores_qr = asked_qd @ normed.T
            mask_qr = top_m_mask(scores_qr[:, self.num_tasks :], self.top_m)
            mask_qr = F.pad(mask_qr, (self.num_tasks, 0))
            weights_qr = scores_qr.masked_fill(~mask_qr, -torch.inf).softmax(dim=1)
            contexts.append(weights_qr @ normed)
            kept.append(mask_qr)
            attention.append(weights_qr.detach())
        context_bkhd = torch.stack(contexts).unflatten(1, (self.num_tasks, self.heads))
        answer_bkd = unfold_values(context_bkhd, self.value.weight)
        tokens_bkd = torch.stack(
            [project(answer_bkd[:, task]) for task, project in enumerate(self.project)], dim=1
        )
        moved_rows, moved = self._projected(normed_rd, torch.cat(kept, dim=1))
        where = torch.cat([rows.token_rows.flatten(), moved_rows])
        answers = torch.cat([tokens_bkd.flatten(0, 1), moved]).to(x_rd.dtype)
        out_rd = x_rd.index_add(0, where, answers)
        weights_khr = torch.cat(attention, dim=1).unflatten(0, (self.num_tasks, self.heads))
        return out_rd, weights_khr.float().mean(dim=1).T

    def _projected(self, normed_rd: Tensor, kept_qr: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that some task keeps (a row once a task), and what its projection makes of them."""
        kept_khr = kept_qr.unflatten(0, (self.num_tasks, self.heads))
        chosen = [kept_hr.any(dim=0).nonzero()[:, 0] for kept_hr in kept_khr]
        gathered = normed_rd[torch.cat(chosen)].split([len(index) for index in chosen])
        parts = []
        for task, (index, patches) in enumerate(zip(chosen, gathered, strict=True)):
            if self.heads > 1:
                of_head = kept_khr[task][:, index].T.to(patches.dtype)
                patches = (patches.unflatten(1, (self.heads, -1)) * of_head[..., None]).flatten(1)
            parts.append(self.project[task](patches))
        return torch.cat(chosen), torch.cat(parts)


class TaskMoE(nn.Module):
    """Soft mixture of experts (eq. 3-5): every slot is a weighted mean of a bag's rows.

    Args:
        dim: D.
        num_slots: S; one expert a slot.
        ratio: hidden width of an expert over D.
        dropout: on the experts' output.
        unit_tokens: rows are L2-normalised before they are scored and make slots.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_slots: int = 8,
        ratio: float = 4.0,
        dropout: float = 0.0,
        unit_tokens: bool = False,
    ) -> None:
        super().__init__()
        hidden = round(dim * ratio)
        self.unit_tokens = unit_tokens
        self.slots = nn.Parameter(torch.randn(dim, num_slots) / math.sqrt(dim))
        self.up = nn.Parameter(torch.empty(num_slots, dim, hidden))
        self.up_bias = nn.Parameter(torch.zeros(num_slots, 1, hidden))
        self.down = nn.Parameter(torch.empty(num_slots, hidden, dim))
        self.down_bias = nn.Parameter(torch.zeros(num_slots, 1, dim))
        nn.init.uniform_(self.up, -1 / math.sqrt(dim), 1 / math.sqrt(dim))
        nn.init.uniform_(self.down, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_rd: Tensor, normed_rd: Tensor, rows: TokenRows, *, tokens_only: bool
    ) -> Tensor:
        """Add the experts' answer to `x_rd`, or to its task tokens alone: (R, D) or (B, K, D)."""
        if self.unit_tokens:
            normed_rd = F.normalize(normed_rd, dim=1)
        scores_rs = normed_rd @ self.slots
        slots_bsd = torch.stack(
            [
                scores.softmax(dim=0).T @ normed
                for scores, normed in zip(
                    scores_rs.split(rows.sizes), normed_rd.split(rows.sizes), strict=True
                )
            ]
        )
        hidden = F.gelu(torch.baddbmm(self.up_bias, slots_bsd.transpose(0, 1), self.up))
        answers_sbd = self.dropout(torch.baddbmm(self.down_bias, hidden, self.down))
        answers_bsd = answers_sbd.transpose(0, 1)
        combine_rs = scores_rs.softmax(dim=1)
        if tokens_only:
            return torch.baddbmm(x_rd[rows.token_rows], combine_rs[rows.token_rows], answers_bsd)
        parts = zip(x_rd.split(rows.sizes), combine_rs.split(rows.sizes), answers_bsd, strict=True)
        return torch.cat([torch.addmm(x, combine, answers) for x, combine, answers in parts])


class UniCAS(Aggregator):
    """All tasks of a slide in one pass.

    `MILOutput.attention` is the first task's in the last block; `aux["task_attention"]` (T, K)
    has all tasks'.

    Args:
        in_dim: width of the instance features.
        num_classes: C, or one C for each task.
        hidden_dim: D; 0 keeps the width of the features, as the paper does (`released`: 768).
        num_blocks: L.
        top_m: m, patches a task attends to in a block.
        num_slots: S, slots and experts.
        expert_ratio: hidden width of an expert over D.
        dropout: on the experts' output.
        released: as in the published code: a linear layer with layer norm and GELU in front, bags
            padded to a square by their first tokens with a PPEG after the first block, 12 heads
            that each keep their own top m, slots made of L2-normalised tokens.
    """

    optimizer_defaults: ClassVar = {
        "lr": 5e-5,
        "weight_decay": 0.0,
        "batch_bags": 16,
        "min_lr": 0.0,
    }

    def __init__(
        self,
        in_dim: int,
        num_classes: int | Sequence[int],
        *,
        hidden_dim: int = 0,
        num_blocks: int = 8,
        top_m: int = 256,
        num_slots: int = 8,
        expert_ratio: float = 4.0,
        dropout: float = 0.0,
        released: bool = False,
    ) -> None:
        super().__init__(in_dim, num_classes)
        dim = hidden_dim or (RELEASED_DIM if released else in_dim)
        heads = RELEASED_HEADS if released else 1
        if dim % heads:
            raise InputError(f"hidden_dim {dim} is not a multiple of the {heads} heads")
        if min(num_blocks, top_m, num_slots) < 1:
            raise InputError("unicas needs num_blocks, top_m and num_slots of 1 or more")
        self.embed = _front(in_dim, dim, released)
        num_tasks = len(self.task_classes)
        self.task_tokens = nn.Parameter(0.02 * torch.randn(num_tasks, dim))
        self.attention_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_blocks))
        self.attentions = nn.ModuleList(
            TaskAttention(dim, num_tasks, top_m=top_m, heads=heads) for _ in range(num_blocks)
        )
        self.moe_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_blocks))
        self.moes = nn.ModuleList(
            TaskMoE(
                dim,
                num_slots=num_slots,
                ratio=expert_ratio,
                dropout=dropout,
                unit_tokens=released,
            )
            for _ in range(num_blocks)
        )
        self.position = PPEG(dim) if released else None
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleList(nn.Linear(dim, classes) for classes in self.task_classes)

    def aggregate(self, features: Tensor, offsets: Tensor, ids: Tensor) -> MILOutput:
        """See `Aggregator.aggregate`."""
        x_rd, rows = self._lay_out(self.embed(features), offsets)
        weights_rk, tokens_bkd = x_rd, x_rd
        parts = zip(self.attention_norms, self.attentions, self.moe_norms, self.moes, strict=True)
        for block, (norm, attention, moe_norm, moe) in enumerate(parts):
            x_rd, weights_rk = attention(x_rd, norm(x_rd), rows)
            last = block == len(self.moes) - 1
            out = moe(x_rd, moe_norm(x_rd), rows, tokens_only=last)
            tokens_bkd, x_rd = (out, x_rd) if last else (tokens_bkd, out)
            if block == 0 and self.position is not None and not last:
                x_rd = self._encode_position(x_rd, rows)
        normed_bkd = self.norm(tokens_bkd)
        logits = [head(normed_bkd[:, task]) for task, head in enumerate(self.heads)]
        patch = rows.origin >= 0
        attention_tk = segment_sum(weights_rk[patch], rows.origin[patch], features.shape[0])
        aux = {"task_attention": attention_tk}
        return MILOutput(torch.cat(logits, dim=1), attention_tk[:, 0], aux)

    def _lay_out(self, embedded_td: Tensor, offsets: Tensor) -> tuple[Tensor, TokenRows]:
        """Rows (R, D) of the task tokens and patches, and which instance each row holds."""
        if self.position is None:
            return prepend_tokens(self.task_tokens, embedded_td, offsets)
        index, squares = square_index(offsets)
        x_rd, rows = prepend_tokens(self.task_tokens, embedded_td[index], squares)
        origin = torch.where(rows.origin >= 0, index[rows.origin], -1)
        return x_rd, rows._replace(origin=origin)

    def _encode_position(self, x_rd: Tensor, rows: TokenRows) -> Tensor:
        assert self.position is not None
        num_tasks = len(self.task_tokens)
        encoded = [
            self.position(x, math.isqrt(len(x) - num_tasks), num_tasks)
            for x in x_rd.split(rows.sizes)
        ]
        return torch.cat(encoded)


def square_index(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Fill each bag up to a square by its first instances: instance of each row, new offsets."""
    pieces = []
    for start, stop in pairwise(offsets.tolist()):
        missing = math.ceil(math.sqrt(stop - start)) ** 2 - (stop - start)
        pieces += [torch.arange(start, stop), torch.arange(start, start + missing)]
    lengths = torch.tensor(
        [len(a) + len(b) for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
    )
    squares = F.pad(lengths.cumsum(0), (1, 0)).to(offsets.device)
    return torch.cat(pieces).to(offsets.device), squares


def _front(in_dim: int, dim: int, released: bool) -> nn.Module:
    """What stands between the features and the first block."""
    if released:
        return nn.Sequential(Linear(in_dim, dim), nn.LayerNorm(dim), nn.GELU())
    return nn.Identity() if dim == in_dim else Linear(in_dim, dim)
