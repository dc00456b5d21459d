"""Variational positive-unlabelled learning (Chen et al. 2020), as LESS trains its tile encoder.

In LESS the labelled positives are tiles of benign slides, so phi is the probability of benign.
Shapes: P labelled positives, U unlabelled.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cytoray.errors import InputError

MIXUP_ALPHA = 0.3
MIXUP_WEIGHT = 0.03


class Mixup(NamedTuple):
    """A mixture of unlabelled and positive inputs, and what phi should say of it.

    Attributes:
        inputs: (U, ...) the mixed inputs.
        targets: (U,) probabilities in 0..1; carry the gradient of phi on the unlabelled inputs.
    """

    inputs: Tensor
    targets: Tensor


def variational_loss(log_phi_unlabelled: Tensor, log_phi_positive: Tensor) -> Tensor:
    """log mean phi(x) over the unlabelled, less the mean of log phi over the positives: a scalar.

    Args:
        log_phi_unlabelled: (U,) log-probabilities of the positive class, <= 0.
        log_phi_positive: (P,) the same of the labelled positives.

    Raises:
        InputError: either is empty.
    """
    if not len(log_phi_unlabelled) or not len(log_phi_positive):
        raise InputError("the variational PU loss needs unlabelled and positive examples")
    log_mean = torch.logsumexp(log_phi_unlabelled, dim=0) - math.log(len(log_phi_unlabelled))
    return log_mean - log_phi_positive.mean()


def mix(
    unlabelled: Tensor,
    positive: Tensor,
    log_phi_unlabelled: Tensor,
    *,
    alpha: float = MIXUP_ALPHA,
    rng: np.random.Generator,
) -> Mixup:
    """Mix every unlabelled input with a positive drawn at random, by one Beta(alpha, alpha) share.

    The target is the same mixture of phi(unlabelled) and 1.

    Args:
        unlabelled: (U, ...) inputs, float.
        positive: (P, ...) inputs of the same trailing shape.
        log_phi_unlabelled: (U,) log phi of the unlabelled inputs.
        alpha: of the Beta distribution.
        rng: of the share and the partners.
    """
    share = float(rng.beta(alpha, alpha))
    partner = torch.from_numpy(rng.integers(0, len(positive), len(unlabelled)))
    chosen = positive[partner.to(positive.device)]
    inputs = share * unlabelled + (1.0 - share) * chosen
    return Mixup(inputs, share * log_phi_unlabelled.exp() + (1.0 - share))


def vpu_loss(
    log_phi_unlabelled: Tensor,
    log_phi_positive: Tensor,
    log_phi_mixed: Tensor,
    mixed_targets: Tensor,
    *,
    mixup_weight: float = MIXUP_WEIGHT,
) -> Tensor:
    """Variational loss plus `mixup_weight` times the mean squared error of log phi on mixtures.

    Args:
        log_phi_unlabelled: (U,) log phi of the unlabelled.
        log_phi_positive: (P,) log phi of the labelled positives.
        log_phi_mixed: (M,) log phi of the mixtures.
        mixed_targets: (M,) their targets, probabilities.
        mixup_weight: of the second term.

    Raises:
        InputError: no unlabelled or no positive example.
    """
    tiny = torch.finfo(mixed_targets.dtype).tiny
    wanted = mixed_targets.clamp(min=tiny).log()
    consistency = (wanted - log_phi_mixed).square().mean()
    return variational_loss(log_phi_unlabelled, log_phi_positive) + mixup_weight * consistency
