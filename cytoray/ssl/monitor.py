"""Numbers that show collapse before the loss does. All on the device, nothing waits for it.

Shapes: B rows, D width, K prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """-sum_k p log p of each row, in nats; (..., K) to (...,)."""
    return torch.special.entr(probabilities).sum(-1)


def feature_std(features: Tensor) -> Tensor:
    """Spread of unit-length features: 0 when all are equal, 1 when they fill the sphere evenly.

    Args:
        features: float (B, D).

    Returns:
        sqrt(sum over the dimensions of the variance), a scalar.
    """
    x = F.normalize(features.float(), dim=-1)
    return x.var(0, unbiased=False).sum().sqrt()


def effective_rank(features: Tensor) -> Tensor:
    """Participation ratio of the covariance spectrum, (sum s)^2 / sum s^2, in [1, min(B, D)].

    The spectrum itself is not needed: both sums are traces, so no decomposition is made.

    Args:
        features: float (B, D).

    Returns:
        Scalar; 0 when all the rows are equal.
    """
    x = F.normalize(features.float(), dim=-1)
    x = x - x.mean(0)
    gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    return gram.diagonal().sum().square() / gram.square().sum().clamp_min(1e-20)
