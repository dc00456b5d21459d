"""TransMIL (Shao et al. 2021): Nyström self-attention over a bag laid out as a square.

Shapes: N instances of a bag, S side of the square, D hidden width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytoray.errors import InputError
from cytoray.mil.base import Aggregator, MILOutput
from cytoray.mil.nystrom import NystromAttention
from cytoray.mil.packing import split_bags
from cytoray.models.linear import Linear


class PPEG(nn.Module):
    """Position encoding by depth-wise convolutions 7, 5 and 3 plus identity on the S x S square."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim) for size in (7, 5, 3)
        )

    def forward(self, tokens_nd: Tensor, side: int, num_special: int = 1) -> Tensor:
        """Tokens (num_special + S*S, D), class or task tokens first, to the same shape."""
        square = tokens_nd[num_special:].T.reshape(1, -1, side, side)
        encoded = F.conv2d(square, *self.merged(), padding=3, groups=square.shape[1])
        return torch.cat([tokens_nd[:num_special], encoded[0].flatten(1).T])

    def merged(self) -> tuple[Tensor, Tensor]:
        """The three convolutions and the identity as one: weight (D, 1, 7, 7), bias (D,)."""
        convolutions = [c for c in self.convolutions if isinstance(c, nn.Conv2d)]
        parts = [F.pad(c.weight, [3 - c.weight.shape[-1] // 2] * 4) for c in convolutions]
        identity = F.pad(torch.ones_like(parts[0][..., :1, :1]), [3] * 4)
        biases = [c.bias for c in convolutions if c.bias is not None]
        return torch.stack([*parts, identity]).sum(dim=0), torch.stack(biases).sum(dim=0)


class TransMIL(Aggregator):
    """TransMIL: bags are processed one at a time, so packing cannot mix them.

    Args:
        in_dim: width of the instance features.
        num_classes: C, or one C for each task.
        hidden_dim: D, a multiple of `heads`.
        heads: attention heads.
        num_landmarks: landmarks of the Nyström approximation.
        dropout: on the output of each attention layer.
        reference: scale the pseudo-inverse over all heads, as the published code does.
    """

    optimizer_defaults: ClassVar = {"lr": 2e-4, "weight_decay": 1e-5}

    def __init__(
        self,
        in_dim: int,
        num_classes: int | Sequence[int],
        *,
        hidden_dim: int = 512,
        heads: int = 8,
        num_landmarks: int = 256,
        dropout: float = 0.1,
        reference: bool = False,
    ) -> None:
        super().__init__(in_dim, num_classes)
        if hidden_dim % heads:
            raise InputError(f"hidden_dim {hidden_dim} is not a multiple of heads {heads}")
        self.embed = nn.Sequential(Linear(in_dim, hidden_dim, relu=True))
        self.class_token = nn.Parameter(torch.randn(1, hidden_dim))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(2))
        self.layers = nn.ModuleList(
            NystromAttention(
                hidden_dim,
                heads=heads,
                num_landmarks=num_landmarks,
                dropout=dropout,
                scale_over="all" if reference else "head",
            )
            for _ in range(2)
        )
        self.position = PPEG(hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.classifier = nn.Linear(hidden_dim, self.num_logits)

    def aggregate(self, features: Tensor, offsets: Tensor, ids: Tensor) -> MILOutput:
        """See `Aggregator.aggregate`."""
        results = [self._one_bag(hidden) for hidden in split_bags(self.embed(features), offsets)]
        pooled, attention = zip(*results, strict=True)
        return MILOutput(self.classifier(torch.stack(pooled)), torch.cat(attention))

    def _one_bag(self, hidden_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Class token (D,) after both layers, and its attention to the instances (N,)."""
        num_instances = hidden_nd.shape[0]
        side = math.ceil(math.sqrt(num_instances))
        repeated = side * side - num_instances
        tokens = torch.cat([self.class_token, hidden_nd, hidden_nd[:repeated]])
        tokens = tokens + self.layers[0](self.norms[0](tokens))[0]
        tokens = self.position(tokens, side)
        change, row = self.layers[1](self.norms[1](tokens), attention_of=0)
        weights = row[1:].float().clamp(min=0)
        attention = weights[:num_instances].clone()
        attention[:repeated] += weights[num_instances:]
        total = attention.sum()
        uniform = torch.full_like(attention, 1.0 / num_instances)
        attention = torch.where(total > 0, attention / total.clamp(min=1e-12), uniform)
        return self.norm(tokens + change)[0], attention
