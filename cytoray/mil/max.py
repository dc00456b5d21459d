"""Max pooling: the baseline that looks only at the extremes of a bag."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cytoray.mil.base import Aggregator, MILOutput
from cytoray.mil.packing import split_bags


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
        pooled, attention = [], []
        for bag_nd in split_bags(features, offsets):
            pooled.append(bag_nd.amax(dim=0))
            attention.append(shares_of_maxima(bag_nd.detach(), pooled[-1].detach()))
        logits = self.classifier(self.dropout(torch.stack(pooled)))
        return MILOutput(logits, torch.cat(attention))


def shares_of_maxima(bag_nd: Tensor, maxima_d: Tensor) -> Tensor:
    """Share of the D maxima that each instance holds: (N,) float32, summing to 1."""
    holders = ((bag_nd - maxima_d).amax(dim=1) == 0).nonzero()[:, 0]  # D of N instances at most
    holds_md = (bag_nd[holders] == maxima_d).float()
    shares = holds_md @ (1.0 / holds_md.sum(dim=0)) / len(maxima_d)
    return torch.zeros(len(bag_nd), device=bag_nd.device).index_copy(0, holders, shares)
