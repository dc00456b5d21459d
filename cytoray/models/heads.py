"""The DINO projection head: MLP, L2 norm, prototypes of unit length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cytoray.models.linear import linear

_CACHED_BYTES = 1 << 20


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
        return F.linear(x, self.unit_rows())

    def unit_rows(self) -> Tensor:
        """The prototypes at unit length, (out_dim, in_dim)."""
        return _UnitRows.apply(self.weight)  # type: ignore[no-any-return]


class _UnitRows(torch.autograd.Function):
    """w / |w| row by row, as `F.normalize`, with two large tensors in place of seven."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        unit = torch.empty_like(weight)
        norm = weight.new_empty(len(weight), 1)
        for rows in _row_runs(weight):
            torch.linalg.vector_norm(weight[rows], dim=-1, keepdim=True, out=norm[rows])
            torch.div(weight[rows], norm[rows].clamp_min_(1e-12), out=unit[rows])
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        unit, norm = ctx.saved_tensors
        gradient = torch.empty_like(upstream)
        for rows in _row_runs(unit):
            along = torch.linalg.vecdot(unit[rows], upstream[rows]).unsqueeze(-1)
            part = torch.addcmul(upstream[rows], unit[rows], along, value=-1.0, out=gradient[rows])
            part.div_(norm[rows])
        return gradient


def _row_runs(x: Tensor) -> list[slice]:
    """Rows that stay in a CPU's cache from one operation to the next; all on another device."""
    step = len(x) if x.device.type != "cpu" else max(1, _CACHED_BYTES // (4 * x.shape[1]))
    return [slice(start, start + step) for start in range(0, len(x), max(step, 1))]


class _Split(torch.autograd.Function):
    """Rows cut in parts. Where the gradient of every part stands in the part's own memory, as
    `soft_cross_entropy` can leave it, that of the whole is there already and is not put together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.whole = x.detach()
        # The same memory, but no views to autograd, which would forbid to write into them.
        parts = tuple(
            x.new_empty(0).set_(x.untyped_storage(), y.storage_offset(), y.shape, y.stride())
            for y in ctx.whole.split(sizes)
        )
        ctx.starts = [part.data_ptr() for part in parts]
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        whole, ctx.whole = ctx.whole, None
        in_place = all(
            part.data_ptr() == start and part.is_contiguous() and part.dtype == whole.dtype
            for part, start in zip(upstream, ctx.starts, strict=True)
            if part.numel()
        )
        return (whole if in_place else torch.cat(upstream)), None


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
        return self.last_layer(self._bottleneck(x))

    def forward_parts(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Logits of several (n, in_dim) blocks of tokens, each a tensor of its own.

        One pass for all of them. Logits are large: a part is a view of the whole, and its gradient
        may take its memory (see `soft_cross_entropy`).
        """
        weight = self.last_layer.unit_rows()
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        logits = linear(self._bottleneck(torch.cat(list(parts))), weight)
        return list(_Split.apply(logits, [len(part) for part in parts]))  # type: ignore[arg-type]

    def _bottleneck(self, x: Tensor) -> Tensor:
        bottleneck = self.mlp(x)
        eps = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        return F.normalize(bottleneck, dim=-1, eps=eps)
