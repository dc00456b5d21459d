"""Teacher targets: Sinkhorn-Knopp (DINOv2) or a moving centre (DINO, iBOT).

Shapes: n rows of this rank, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cytoray.ssl.collectives import all_max, all_sum
from cytoray.ssl.losses.cross_entropy import row_blocks

TINY = 1e-30  # keeps empty rows and columns finite


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, *, temp: float, iterations: int = 3, overwrite: bool = False
) -> Tensor:
    """Targets whose mass is spread evenly over the prototypes (Caron et al. 2020, eq. 3).

    The matrix exp(logits / temp) is kept as it is; each iteration updates a factor per prototype
    and one per row, so it costs two matrix-vector products. One maximum over all ranks is
    subtracted: a maximum per row would change the result.

    Args:
        logits: (n, K); n may differ between ranks and may be 0.
        temp: temperature of the teacher.
        iterations: pairs of normalisations.
        overwrite: the result may take the memory of `logits`.

    Returns:
        float32 (n, K); every row sums to 1.
    """
    scores = logits.float()
    rows, prototypes = scores.shape
    largest = scores.max() if rows else scores.new_full((), -torch.inf)
    largest = all_max(largest.clone())
    in_place = overwrite and scores is logits
    kernel = (scores.sub_(largest) if in_place else scores - largest).div_(temp).exp_()
    count = all_sum(scores.new_full((), float(rows)))
    row_factor = scores.new_ones(rows)
    column_factor = scores.new_ones(prototypes)
    for _ in range(iterations):
        column_sum = all_sum(row_factor @ kernel)
        column_factor = 1.0 / (prototypes * column_sum.clamp_min(TINY))
        row_factor = 1.0 / (count * (kernel @ column_factor).clamp_min(TINY))
    return kernel.mul_(column_factor).mul_((row_factor * count).unsqueeze(1))


def _softmax(
    scores: Tensor, centre: Tensor, temp: float, total: Tensor, *, overwrite: bool
) -> Tensor:
    """softmax((scores - centre) / temp), and the sum of the rows of `scores` added to `total`.

    On a CPU a few rows at a time, while they are in cache.
    """
    if scores.device.type != "cpu":
        total += scores.sum(0)
        return torch.softmax((scores - centre).div_(temp), dim=-1)
    out = scores if overwrite else torch.empty_like(scores)
    for rows in row_blocks(scores):
        total += scores[rows].sum(0)
        work = torch.sub(scores[rows], centre, out=out[rows]).div_(temp)
        work.sub_(work.amax(-1, keepdim=True)).exp_()
        work.div_(work.sum(-1, keepdim=True))
    return out


class MovingCentre(nn.Module):
    """softmax((logits - c) / temp) with c the moving mean of the logits (Caron et al. 2021, eq. 4).

    Args:
        dim: number of prototypes K.
        momentum: share of the old centre that is kept.
    """

    centre: Tensor

    def __init__(self, dim: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(dim))

    @torch.no_grad()
    def forward(self, logits: Tensor, *, temp: float, overwrite: bool = False) -> Tensor:
        """Targets (n, K) float32 by the centre so far; then the centre takes in all ranks' rows.

        With `overwrite` the targets may take the memory of the logits.
        """
        scores = logits.float()
        total = scores.new_zeros(scores.shape[1] + 1)
        total[-1] = scores.shape[0]
        targets = _softmax(scores, self.centre, temp, total[:-1], overwrite=overwrite)
        all_sum(total)
        usable = (total[-1] > 0) & total.isfinite().all()
        mean = torch.where(usable, total[:-1] / total[-1].clamp_min(1), self.centre)
        self.centre.lerp_(mean, 1.0 - self.momentum)
        return targets


class Sinkhorn(nn.Module):
    """`sinkhorn_knopp` as a module with the signature of `MovingCentre`; it has no state."""

    def forward(self, logits: Tensor, *, temp: float, overwrite: bool = False) -> Tensor:
        return sinkhorn_knopp(logits, temp=temp, overwrite=overwrite)


def build_targets(name: str, dim: int, *, centre_momentum: float) -> nn.Module:
    """The module that turns teacher logits (n, dim) into targets, by the name in `TARGETS`."""
    return TARGETS[name](dim, centre_momentum)


TARGETS = {
    "sinkhorn": lambda dim, momentum: Sinkhorn(),
    "centering": lambda dim, momentum: MovingCentre(dim, momentum=momentum),
}
