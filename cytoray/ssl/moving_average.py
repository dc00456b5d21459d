"""The moving average that a teacher or momentum network is of its student."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cytoray.models.lora import lora_layers
from cytoray.ssl.batch_norm import as_momentum_network

Network = TypeVar("Network", bound=nn.Module)


def momentum_copy(network: Network) -> Network:
    """A copy that is not trained, in its mode; the base below LoRA is shared, not copied."""
    frozen = [p for p in network.parameters() if not p.requires_grad]
    memo = {id(p): p for p in frozen} if lora_layers(network) else {}
    copied = copy.deepcopy(network, memo).requires_grad_(False)
    as_momentum_network(copied)
    return copied


def local_part(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor, in the same memory; a plain tensor is its own."""
    if not isinstance(tensor, DTensor):
        return tensor
    return cast(DTensor, tensor.detach()).to_local()


class MovingAverage:
    """Lets teachers follow their students; which parameters they have is looked up once.

    Args:
        networks: (teacher, student) pairs. The two have the same parameters in the same order and,
            where they are sharded, cut in the same way: each rank then averages its own piece. What
            a teacher shares with its student is left alone.
    """

    def __init__(self, *networks: tuple[nn.Module, nn.Module]) -> None:
        pairs = [
            (old, new)
            for teacher, student in networks
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True)
            if old is not new
        ]
        self._teachers = [old for old, _ in pairs]
        self._students = [new for _, new in pairs]

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, in place and in one pass."""
        old, new = ([local_part(p) for p in own] for own in (self._teachers, self._students))
        torch._foreach_lerp_(old, new, 1.0 - momentum)
