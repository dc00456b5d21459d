"""Attention-based MIL (Ilse et al. 2018): h = ReLU(Wx), a = softmax_N(score(h)), z = sum a h.

Shapes: B bags, T instances of all bags together, H hidden width, L attention width, K heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cytoray.mil.base import Aggregator, MILOutput
from cytoray.mil.dropout import Dropout
from cytoray.mil.packing import segment_softmax, weighted_sums
from cytoray.models.linear import Linear, linear


class AttentionScorer(nn.Module):
    """Instance scores w.(tanh(Vh) * sigmoid(Uh)), or w.tanh(Vh) without the gate: (T, H) to (T, K).

    Args:
        hidden_dim: H.
        attention_dim: L.
        gated: multiply by the sigmoid gate (eq. 9 of the paper; eq. 8 without).
        dropout: after each of the two branches.
        heads: K score columns.
    """

    def __init__(
        self,
        hidden_dim: int,
        attention_dim: int,
        *,
        gated: bool = True,
        dropout: float = 0.0,
        heads: int = 1,
    ) -> None:
        super().__init__()
        self.value = Linear(hidden_dim, attention_dim)
        self.gate = Linear(hidden_dim, attention_dim) if gated else None
        self.dropout = Dropout(dropout)
        self.score = nn.Linear(attention_dim, heads)

    def forward(self, hidden_th: Tensor) -> Tensor:
        """Scores (T, K) before the softmax."""
        if self.gate is None:
            return self.score(self.dropout(torch.tanh(self.value(hidden_th))))
        weight = torch.cat([self.value.weight, self.gate.weight])
        bias = torch.cat([self.value.bias, self.gate.bias])
        value_tl, gate_tl = linear(hidden_th, weight, bias).chunk(2, dim=1)  # one product for two
        gate_tl = self.dropout(torch.sigmoid(gate_tl))
        return self.score(self.dropout(torch.tanh(value_tl)) * gate_tl)


def attention_pool(
    hidden_th: Tensor, scores_tk: Tensor, offsets: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax each score column within its bag and sum the instances under it.

    Args:
        hidden_th: (T, H).
        scores_tk: (T, K).
        offsets: (B + 1,) int64.
        ids: (T,) int64, the bag of each instance.

    Returns:
        (B, K, H), and the attention (T, K) float32.
    """
    attention_tk = segment_softmax(scores_tk, ids, offsets.shape[0] - 1)
    return weighted_sums(attention_tk, hidden_th, offsets), attention_tk


class ABMIL(Aggregator):
    """Attention-based MIL.

    Args:
        in_dim: width D of the instance features.
        num_classes: C, or one C for each task.
        hidden_dim: H; the paper uses 500.
        attention_dim: L.
        gated: the gated form of the attention.
        dropout: on the hidden features and in the attention branches.
    """

    optimizer_defaults: ClassVar = {"lr": 5e-4, "weight_decay": 1e-4}
    cpu_instances: ClassVar = 4096

    def __init__(
        self,
        in_dim: int,
        num_classes: int | Sequence[int],
        *,
        hidden_dim: int = 512,
        attention_dim: int = 128,
        gated: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_dim, num_classes)
        self.embed = nn.Sequential(Linear(in_dim, hidden_dim, relu=True), Dropout(dropout))
        self.attention = AttentionScorer(hidden_dim, attention_dim, gated=gated, dropout=dropout)
        self.classifier = nn.Linear(hidden_dim, self.num_logits)

    def aggregate(self, features: Tensor, offsets: Tensor, ids: Tensor) -> MILOutput:
        """See `Aggregator.aggregate`."""
        hidden_th = self.embed(features)
        scores_t1 = self.attention(hidden_th)
        pooled_b1h, attention_t1 = attention_pool(hidden_th, scores_t1, offsets, ids)
        return MILOutput(self.classifier(pooled_b1h[:, 0]), attention_t1[:, 0].detach())
