"""How the blocks of a backbone are run, as suits the device."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn
from torch.utils._triton import has_triton

from cytoray.models.backbones import ViTBackbone
from cytoray.models.conv_backbone import ConvBackbone
from cytoray.models.linear import use_cpu_products


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` makes code for this CUDA device; False for a CPU."""
    has_compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    return device.type == "cuda" and has_compiler and has_triton()


def set_block_passes(
    method: nn.Module, device: torch.device, *, pack_crops: bool | None, compiled: bool | None
) -> None:
    """Say how the backbones of a method run their blocks; None: as suits the device."""
    pack = device.type == "cuda" if pack_crops is None else pack_crops
    compiled = can_compile(device) if compiled is None else compiled
    if device.type == "cpu":
        use_cpu_products(method)
    for backbone in method.modules():
        if isinstance(backbone, ViTBackbone | ConvBackbone):
            backbone.pack = pack
            backbone.compile_backend = "inductor" if compiled else None
