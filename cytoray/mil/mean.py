"""Mean pooling: the baseline every table needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cytoray.mil.base import Aggregator, MILOutput
from cytoray.mil.packing import split_bags


class MeanPool(Aggregator):
    """Linear classifier on the mean of a bag's features; every instance weighs 1/N.

    Args:
        in_dim: width D of the instance features.
        num_classes: C, or one C for each task.
        dropout: on the pooled features.
    """

    def __init__(
        self, in_dim: int, num_classes: int | Sequence[int], *, dropout: float = 0.0
    ) -> None:
        super().__init__(in_dim, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(in_dim, self.num_logits)

    def aggregate(self, features: Tensor, offsets: Tensor, ids: Tensor) -> MILOutput:
        """See `Aggregator.aggregate`."""
        attention = (1.0 / offsets.diff().float())[ids]
        pooled_bd = torch.stack([bag.mean(dim=0) for bag in split_bags(features, offsets)])
        return MILOutput(self.classifier(self.dropout(pooled_bd)), attention)
