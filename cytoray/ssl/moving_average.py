"""The moving average that a teacher or momentum network is of its student."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
    old, new = zip(*((local_part(t), local_part(s)) for t, s in pairs), strict=True)
    torch._foreach_lerp_(list(old), list(new), 1.0 - momentum)
