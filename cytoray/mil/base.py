"""What every aggregator is: packed bags in, bag logits and instance attention out.

Shapes: B bags, T instances of all bags together, D width, C classes.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from cytoray.mil.packing import bag_ids, check_packed


@dataclass
class MILOutput:
    """What an aggregator says about a batch of bags.

    Attributes:
        logits: (B, C) float.
        attention: (T,) float32 >= 0, detached; sums to 1 over each bag. How much of the bag's
            answer each instance carries.
        aux: further tensors the aggregator's own loss needs, by name.
    """

    logits: Tensor
    attention: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)


class Aggregator(nn.Module, ABC):
    """Base of the MIL aggregators: subclasses implement `aggregate`, and `loss` where needed.

    Args:
        in_dim: width D of the instance features.
        num_classes: C, at least 2.
    """

    def __init__(self, in_dim: int, num_classes: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.num_classes = num_classes

    def forward(self, features: Tensor, offsets: Tensor) -> MILOutput:
        """Aggregate packed bags.

        Args:
            features: (T, D); float16 features are converted to the aggregator's precision.
            offsets: (B + 1,) int64, bag b is `features[offsets[b]:offsets[b + 1]]`.

        Raises:
            InputError: an empty bag, or a width that is not `in_dim`.
        """
        check_packed(features, offsets, self.in_dim)
        features = features.to(next(self.parameters()).dtype)
        return self.aggregate(features, offsets, bag_ids(offsets, features.shape[0]))

    @abstractmethod
    def aggregate(self, features: Tensor, offsets: Tensor, ids: Tensor) -> MILOutput:
        """The aggregator's maths on a checked batch; `ids` (T,) names each instance's bag."""

    def loss(
        self, output: MILOutput, labels: Tensor, class_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms to minimise, already weighted: their sum is the training loss.

        Args:
            output: what `forward` returned.
            labels: (B,) int64 in 0..C-1.
            class_weight: (C,) float, or None for equal weights.
        """
        return {"bag": F.cross_entropy(output.logits.float(), labels, class_weight)}


def options_of(factory: Callable[..., Aggregator]) -> tuple[str, ...]:
    """The keyword options an aggregator takes besides in_dim and num_classes."""
    names = inspect.signature(factory).parameters
    return tuple(name for name in names if name not in ("in_dim", "num_classes"))
