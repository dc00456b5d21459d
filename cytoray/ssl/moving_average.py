"""The moving average that a teacher or momentum network is of its student."""

from __future__ import annotations

import copy
from typing import TypeVar

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
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in place and in one pass.

    Args:
        teacher: module with the parameters of `student` in the same order and, where they are
            sharded, cut in the same way: each rank then averages its own piece.
        student: what is followed.
        momentum: share of the old teacher.
    """
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    own = ((t, s) for t, s in pairs if t is not s)
    old, new = zip(*((local_part(t), local_part(s)) for t, s in own), strict=True)
    torch._foreach_lerp_(list(old), list(new), 1.0 - momentum)
