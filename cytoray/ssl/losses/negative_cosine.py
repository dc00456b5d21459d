"""BYOL: squared distance between unit-length predictions and targets (Grill et al. 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def byol_loss(predictions: Tensor, targets: Tensor, *, global_batch: int) -> Tensor:
    """This rank's part of BYOL's loss; the ranks' sum is the loss.

    2 - 2 cos of each view's prediction to the target of the tile's other view, summed over both
    and averaged over the tiles (eq. 2, made symmetric).

    Args:
        predictions: float (b, 2, D), of the online network.
        targets: float (b, 2, D), of the momentum network, without gradient.
        global_batch: tiles over all ranks.

    Returns:
        float32 scalar.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        cosines = F.cosine_similarity(predictions.float(), targets.float().flip(1), dim=-1)
        return torch.sum(2 - 2 * cosines) / global_batch
