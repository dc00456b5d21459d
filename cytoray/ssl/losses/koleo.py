"""KoLeo: spread the features by pushing each from its nearest neighbour (Sablayrolles 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cytoray.ssl.collectives import gather_rows

EPS = 1e-8


def koleo(features: Tensor) -> Tensor:
    """-mean_i log ||x_i - x_nn(i)|| over unit-length rows; (B, D) to a float32 scalar."""
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1, eps=EPS)
        with torch.no_grad():
            similarity = x @ x.T
            similarity.fill_diagonal_(-2.0)
            nearest = similarity.argmax(dim=1)
        distance = F.pairwise_distance(x, x[nearest], p=2, eps=EPS)
        return -torch.log(distance + EPS).mean()


def koleo_loss(student_cls: Tensor, *, global_batch: int, offset: int) -> Tensor:
    """KoLeo of the tiles of all ranks, per global crop, summed over the global crops.

    Every rank returns the whole value; gradients reach this rank's own rows only, so that their
    sum over the ranks is the gradient of the loss.

    Args:
        student_cls: (b, G, D) class tokens before the head.
        global_batch: tiles over all ranks.
        offset: position of this rank's first tile.

    Returns:
        float32 scalar.
    """
    crops = student_cls.float().unbind(1)
    parts = [koleo(gather_rows(x, total=global_batch, offset=offset)) for x in crops]
    return torch.stack(parts).sum()
