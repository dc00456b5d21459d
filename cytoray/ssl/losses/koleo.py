"""KoLeo: spread the features by pushing each from its nearest neighbour (Sablayrolles 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cytoray.ssl.collectives import RowGathering

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


class KoleoLoss:
    """KoLeo of the tiles of all ranks, per global crop, summed over the global crops.

    The ranks exchange their class tokens from the making of this to `value`: what is computed
    between costs no wait. Every rank has the whole value; gradients reach this rank's own rows
    only, so that their sum over the ranks is the gradient of the loss.

    Args:
        student_cls: (b, G, D) class tokens before the head.
        global_batch: tiles over all ranks.
        offset: position of this rank's first tile.
    """

    def __init__(self, student_cls: Tensor, *, global_batch: int, offset: int) -> None:
        self._shape = student_cls.shape[1:]
        rows = student_cls.float().flatten(1)
        self._gathering = RowGathering(rows, total=global_batch, offset=offset)

    def value(self) -> Tensor:
        """float32 scalar."""
        crops = self._gathering.rows().unflatten(1, self._shape).unbind(1)
        return torch.stack([koleo(x) for x in crops]).sum()


def koleo_loss(student_cls: Tensor, *, global_batch: int, offset: int) -> Tensor:
    """The value of `KoleoLoss` at once, float32 scalar."""
    return KoleoLoss(student_cls, global_batch=global_batch, offset=offset).value()
