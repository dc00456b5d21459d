"""`torch.compile` where it serves: one piece of code for a function, whatever shapes it meets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.utils._triton import has_triton

_MOST_CODES = 64


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` makes code for this CUDA device; False for a CPU."""
    has_compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    return device.type == "cuda" and has_compiler and has_triton()


def allow_many_codes() -> None:
    """Let a function have more codes than torch's default of 8, past which it runs as it is.

    A block has code for teacher and student, with gradients and without, for each crop size, for
    each model of a process; those that modules of timm share count together.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _MOST_CODES)


@lru_cache(maxsize=64)
def compiled(function: Callable[..., Any], backend: str, *, dynamic: bool) -> Callable[..., Any]:
    """`function` compiled, the same for all who ask.

    Args:
        function: of tensors and plain values.
        backend: of `torch.compile`.
        dynamic: code for any shape; False: new code for each shape (marked dimensions excepted).
    """
    return torch.compile(function, backend=backend, dynamic=dynamic)
