"""The DINO projection head: MLP, L2 norm, prototypes of unit length."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrototypeLayer(nn.Module):
    """Cosine to `out_dim` prototypes: a weight-normed linear layer whose gain is fixed at 1.

    Args:
        in_dim: width of the (unit length) input.
        out_dim: number of prototypes K.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) to (..., out_dim), in [-1, 1] for unit x."""
        return F.linear(x, F.normalize(self.weight, dim=-1))


class DINOHead(nn.Module):
    """Projection head of DINO, iBOT and DINOv2.

    Args:
        in_dim: width of the backbone.
        out_dim: number of prototypes K.
        hidden_dim: width of the MLP.
        bottleneck_dim: width of its output, which is scaled to unit length.
        num_layers: linear layers in the MLP (at least 1).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            linear = nn.Linear(width_in, width_out)
            # 0.02 at the usual width of 2048, and the same signal for narrower heads
            nn.init.trunc_normal_(linear.weight, std=width_in**-0.5)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., in_dim) to logits (..., out_dim), cosines in [-1, 1]."""
        bottleneck = self.mlp(x)
        eps = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(bottleneck, dim=-1, eps=eps))
