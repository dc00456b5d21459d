"""Which number format matrix products run in. Weights, losses and optimisers are fp32 always."""

from __future__ import annotations

from functools import lru_cache

import torch

PRECISIONS = ("auto", "fp32", "bf16")


@lru_cache
def has_native_bf16(kind: str) -> bool:
    """Whether the devices of a kind (`cpu`, `cuda`) multiply bf16 in hardware.

    GPUs do from compute capability 8.0 on, CPUs with AVX512-BF16 or AMX; elsewhere bf16 is
    emulated and slower than fp32.
    """
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        # PyTorch has no public way to ask that works in 2.11.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` as bf16 where the device has it in hardware, else fp32; others as they are."""
    if precision == "auto":
        return "bf16" if has_native_bf16(device.type) else "fp32"
    return precision


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which matrix products run in `precision` (one of `PRECISIONS`)."""
    enabled = resolve_precision(precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
