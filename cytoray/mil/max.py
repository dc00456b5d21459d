"""Max pooling: the baseline that looks only at the extremes of a bag."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cytoray.mil.base import Aggregator, MILOutput
from cytoray.mil.packing import segment_max, segment_sum


class MaxPool(Aggregator):
    """Linear classifier on the feature-wise maximum of a bag.

    An instance's attention is the share of the features whose maximum it holds (ties share).

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
        num_bags = offsets.shape[0] - 1
        pooled_bd = segment_max(features, ids, num_bags)
        holds_td = (features.detach() == pooled_bd.detach()[ids]).float()
        attention = (holds_td / segment_sum(holds_td, ids, num_bags)[ids]).mean(dim=1)
        return MILOutput(self.classifier(self.dropout(pooled_bd)), attention)
