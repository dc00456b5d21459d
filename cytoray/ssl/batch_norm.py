"""Batch normalisation over the rows of all ranks, so that a step is the same on any number of them.

Shapes: n rows of this rank, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cytoray.ssl.collectives import all_sum


class _SumOverRanks(torch.autograd.Function):
    """A sum that every rank uses: its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_sum(x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_sum(grad.clone())


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over the ranks, with gradient; all ranks must take part in both passes."""
    return _SumOverRanks.apply(x)  # type: ignore[return-value]


def batch_norm(x: Tensor, *, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) per column, over the rows of all ranks.

    Args:
        x: float (n, D); n may differ between ranks.
        eps: added to the (biased) variance.

    Returns:
        float32 (n, D).
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        rows = x.new_full((1,), float(x.shape[0]))
        total = sum_over_ranks(torch.cat([x.sum(0), rows]))
        centred = x - total[:-1] / total[-1]
        variance = sum_over_ranks(centred.square().sum(0)) / total[-1]
        return centred * torch.rsqrt(variance + eps)


class GlobalBatchNorm(nn.Module):
    """`batch_norm` with learnt scale and shift; statistics are of the batch in every mode.

    Projection heads are not used after pretraining, and the momentum networks of MoCo and BYOL
    take the statistics of the batch as well: there are no running averages.

    Args:
        dim: width D.
        affine: learn scale and shift.
    """

    def __init__(self, dim: int, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) to (n, D) of the same type."""
        out = batch_norm(x)
        if self.weight is not None and self.bias is not None:
            out = out * self.weight + self.bias
        return out.to(x.dtype)


def projection_mlp(widths: list[int], *, norm: bool = True, last_norm: bool = False) -> nn.Module:
    """Linear layers with batch norm and ReLU between them, as in SimCLR, BYOL and MoCo.

    Args:
        widths: of the input, the hidden layers and the output.
        norm: normalise the hidden layers. Then no layer has a bias: batch norm here or, behind the
            last layer, in the predictor would take it out again.
        last_norm: normalise the output, without learnt scale and shift.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    last = len(widths) - 2
    for index, (width_in, width_out) in enumerate(pairwise(widths)):
        normed = last_norm if index == last else norm
        parts[f"linear{index}"] = nn.Linear(width_in, width_out, bias=not norm)
        if normed:
            parts[f"norm{index}"] = GlobalBatchNorm(width_out, affine=index != last)
        if index != last:
            parts[f"relu{index}"] = nn.ReLU(inplace=True)
    return nn.Sequential(parts)
