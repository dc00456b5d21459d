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

from cytoray.ssl.collectives import all_sum, world_size


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


class RankBatchNorm(nn.BatchNorm2d):
    """timm's batch norm, over the crops of all ranks while it trains; names and values are kept."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, D, H, W) to the same; running averages follow the statistics of all ranks."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            count = wide.new_full((1,), wide.numel() / wide.shape[1])
            total = sum_over_ranks(torch.cat([wide.sum((0, 2, 3)), count]))
            mean = total[:-1] / total[-1]
            centred = wide - mean[:, None, None]
            variance = sum_over_ranks(centred.square().sum((0, 2, 3))) / total[-1]
            self._remember(mean.detach(), variance.detach(), total[-1].detach())
            factor = self.weight * torch.rsqrt(variance + self.eps)
            return (centred * factor[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1


def norm_over_ranks(module: nn.Module) -> None:
    """Let the batch norm of a ResNet see the crops of all ranks, in place; values are kept."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            made = RankBatchNorm(child.num_features, child.eps, child.momentum, device="meta")
            made.train(child.training)
            made.load_state_dict(child.state_dict(), assign=True)
            setattr(module, name, made)
        else:
            norm_over_ranks(child)


def as_momentum_network(network: nn.Module) -> None:
    """Evaluation mode, but batch norm takes the statistics of the batch, as DINO and BYOL do."""
    network.eval()
    for module in network.modules():
        if isinstance(module, RankBatchNorm):
            module.train()


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
