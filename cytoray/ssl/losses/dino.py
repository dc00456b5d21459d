"""DINO: cross-entropy between teacher targets and student logits over pairs of crops.

Shapes: b tiles of this rank, G global crops, L local crops, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor, *, student_temp: float) -> Tensor:
    """-sum_k t_k log softmax(s / temp)_k, for targets that sum to 1, without storing log softmax.

    Args:
        logits: float (..., K).
        targets: float32 (..., K), rows sum to 1.
        student_temp: temperature of the student.

    Returns:
        float32 (...,).
    """
    scaled = logits.float() / student_temp
    return torch.logsumexp(scaled, dim=-1) - (targets * scaled).sum(-1)


def dino_loss(
    student_global: Tensor,
    student_local: Tensor | None,
    targets: Tensor,
    *,
    student_temp: float,
    global_batch: int,
) -> Tensor:
    """This rank's part of the DINO loss (Caron et al. 2021, eq. 3); the ranks' sum is the loss.

    Every teacher global crop against every *other* student crop of the tile, averaged over pairs
    and over the tiles of all ranks.

    Args:
        student_global: (b, G, K) logits.
        student_local: (b, L, K) logits, or None.
        targets: float32 (b, G, K), teacher probabilities.
        student_temp: temperature of the student.
        global_batch: tiles over all ranks.

    Returns:
        float32 scalar.
    """
    num_global = targets.shape[1]
    num_local = 0 if student_local is None else student_local.shape[1]
    total = targets.sum(1, keepdim=True)
    loss = _against_sum(student_global, total - targets, num_global - 1, student_temp)
    if student_local is not None and num_local:
        loss = loss + _against_sum(student_local, total, num_global, student_temp)
    pairs = num_global * (num_global - 1 + num_local)
    return loss / (pairs * global_batch)


def _against_sum(logits: Tensor, target_sum: Tensor, count: int, temp: float) -> Tensor:
    """Sum of the cross-entropies of `logits` against `count` targets given as their sum."""
    scaled = logits.float() / temp
    return count * torch.logsumexp(scaled, dim=-1).sum() - (target_sum * scaled).sum()
