"""How the parts of a method are run, as suits the device."""

from __future__ import annotations

import torch
from torch import nn

from cytoray.compilation import allow_many_codes, can_compile
from cytoray.models.linear import use_cpu_products, use_patch_products


def set_block_passes(
    method: nn.Module, device: torch.device, *, pack_crops: bool | None, compiled: bool | None
) -> None:
    """Say how backbones run their blocks, and what is compiled; None: as suits the device."""
    pack = device.type == "cuda" if pack_crops is None else pack_crops
    compiled = can_compile(device) if compiled is None else compiled
    if compiled:
        allow_many_codes()
    if device.type == "cpu":
        use_cpu_products(method)
    if device.type == "cuda":
        use_patch_products(method)
    for module in method.modules():
        if hasattr(module, "pack"):
            module.pack = pack  # type: ignore[assignment]
        if hasattr(module, "compile_backend"):
            module.compile_backend = "inductor" if compiled else None  # type: ignore[assignment]
