"""DSMIL (Li et al. 2021): the strongest instance of each class asks, the bag answers.

Shapes: B bags, T instances of all bags together, N of one bag, D width, C classes, Q query width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cytoray.mil.base import Aggregator, ClassWeight, MILOutput, task_cross_entropy
from cytoray.mil.dropout import Dropout
from cytoray.mil.packing import segment_argmax, segment_softmax, split_bags, weighted_sums
from cytoray.models.linear import Linear


class DSMIL(Aggregator):
    """Dual-stream MIL: an instance classifier with max pooling, and attention to its maxima.

    `MILOutput.attention` is the attention of the predicted class; `aux["class_attention"]`
    (T, C) has all of them.

    Args:
        in_dim: D, width of the instance features.
        num_classes: C, or one for each task: C is then their sum.
        query_dim: Q.
        dropout: on the values that the attention pools.
    """

    optimizer_defaults: ClassVar = {
        "lr": 1e-4,
        "weight_decay": 1e-3,
        "betas": (0.5, 0.9),
        "min_lr": 5e-6,
    }

    def __init__(
        self,
        in_dim: int,
        num_classes: int | Sequence[int],
        *,
        query_dim: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_dim, num_classes)
        self.instance_classifier = nn.Linear(in_dim, self.num_logits)
        self.query = nn.Sequential(
            Linear(in_dim, query_dim), nn.ReLU(), Linear(query_dim, query_dim), nn.Tanh()
        )
        self.dropout = Dropout(dropout)
        self.bag_classifier = nn.Conv1d(self.num_logits, self.num_logits, kernel_size=in_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.orthogonal_(module.weight.flatten(1))
                nn.init.zeros_(module.bias) if module.bias is not None else None

    def aggregate(self, features: Tensor, offsets: Tensor, ids: Tensor) -> MILOutput:
        """See `Aggregator.aggregate`."""
        num_bags = offsets.shape[0] - 1
        instance_tc = self.instance_classifier(features)
        critical_bc = segment_argmax(instance_tc, ids, num_bags)
        query_tq = self.query(features)
        critical_bcq = query_tq[critical_bc]
        scores_tc = torch.cat(
            [
                query_nq @ asked_cq.T
                for query_nq, asked_cq in zip(
                    split_bags(query_tq, offsets), critical_bcq, strict=True
                )
            ]
        ) / math.sqrt(query_tq.shape[1])
        attention_tc = segment_softmax(scores_tc, ids, num_bags)
        pooled_bcd = weighted_sums(attention_tc, self.dropout(features), offsets)
        logits_bc = self.bag_classifier(pooled_bcd)[:, :, 0]
        chosen = logits_bc[:, : self.num_classes].argmax(dim=1)[ids]
        attention_t = attention_tc.detach().gather(1, chosen[:, None])[:, 0]
        classes = torch.arange(self.num_logits, device=features.device)
        aux = {
            "max_logits": instance_tc[critical_bc, classes],
            "class_attention": attention_tc.detach(),
        }
        return MILOutput(logits_bc, attention_t, aux)

    def loss(
        self, output: MILOutput, labels: Tensor, class_weight: ClassWeight = None
    ) -> dict[str, Tensor]:
        """Half the bag's cross-entropy, half that of its strongest instances."""
        bag = task_cross_entropy(output.task_logits, labels, class_weight)
        max_logits = output.aux["max_logits"].split(self.task_classes, dim=1)
        strongest = task_cross_entropy(max_logits, labels, class_weight)
        return {"bag": 0.5 * bag, "max_instance": 0.5 * strongest}
