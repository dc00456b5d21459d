"""AdamW for trials, in one fused pass over the parameters.

`torch.optim.AdamW` imports the compiler of PyTorch when the first one is made, which takes longer
than many a trial: 1 to 1.5 s in every process of a search.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019), as `torch.optim.AdamW(fused=True)`.

    Args:
        groups: `params` and any of `lr`, `betas`, `eps`, `weight_decay` of each.

    Attributes:
        param_groups: `groups` with the defaults filled in; read at every step.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        self.param_groups = [_DEFAULTS | {**group, "params": list(group["params"])}
                             for group in groups]  # fmt: skip
        self._moments: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            means, squares, steps = (list(c) for c in zip(*map(self._state, params), strict=True))
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [p.grad for p in params],
                means,
                squares,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Running mean, running mean of squares and step count of a parameter."""
        if parameter not in self._moments:
            self._moments[parameter] = (
                torch.zeros_like(parameter),
                torch.zeros_like(parameter),
                torch.zeros((), device=parameter.device),
            )
        return self._moments[parameter]
