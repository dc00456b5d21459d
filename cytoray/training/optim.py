"""AdamW with layer-wise learning rates and selective weight decay."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from cytoray.ssl.collectives import all_sum
from cytoray.ssl.moving_average import local_part
from cytoray.training.schedules import StepValues

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_STAGE = re.compile(r"(?:^|\.)net\.layer(\d+)\.")  # of a ResNet
_EMBEDDING = ("patch_embed", "pos_embed", "cls_token", "reg_token", "mask_token", "net")


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter: 0 embeddings, 1..depth blocks, depth + 1 final norm and heads."""
    found = _BLOCK.search(name)
    if found:
        return int(found.group(1)) + 1
    stage = _STAGE.search(name)
    if stage:
        return int(stage.group(1))
    if any(part in _EMBEDDING for part in name.split(".")):
        return 0
    return depth + 1


def decays(name: str) -> bool:
    """Whether weight decay applies: not to biases, norms and LayerScale gammas."""
    *parents, leaf = name.split(".")
    if leaf in ("bias", "gamma", "gamma_1", "gamma_2") or leaf.endswith("_bias"):
        return False
    return not any("norm" in parent or parent in ("ls1", "ls2") for parent in parents)


def parameter_groups(
    student: nn.Module, *, depth: int, layer_decay: float, patch_embed_lr_mult: float
) -> list[dict[str, Any]]:
    """One group for each (learning rate factor, decay or not, last layer or not).

    Args:
        student: module with parameters named as in timm below its backbone.
        depth: blocks L of the backbone; layer i has the factor layer_decay^(L + 1 - i).
        layer_decay: factor from a layer to the one below.
        patch_embed_lr_mult: further factor of the patch embedding.

    Returns:
        Groups with `params`, `lr_mult`, `wd_mult`, `last_layer` for AdamW, in a fixed order.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = defaultdict(list)
    undecayed = {
        f"{name}.weight" for name, m in student.named_modules() if isinstance(m, nn.BatchNorm2d)
    }
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        lr_mult = layer_decay ** (depth + 1 - layer_of(name, depth))
        if "patch_embed" in name:
            lr_mult *= patch_embed_lr_mult
        decay = decays(name) and name not in undecayed
        key = (lr_mult, float(decay), "last_layer" in name)
        groups[key].append(parameter)
    return [
        {"params": parameters, "lr_mult": lr, "wd_mult": wd, "last_layer": last}
        for (lr, wd, last), parameters in groups.items()
    ]


def build_optimizer(groups: list[dict[str, Any]], *, beta1: float, beta2: float) -> AdamW:
    """Fused AdamW; rates are set by `apply_schedule` before each step."""
    return AdamW(groups, lr=0.0, betas=(beta1, beta2), fused=True)


def apply_schedule(optimizer: AdamW, values: StepValues) -> None:
    """Set learning rate and weight decay of every group for this step."""
    for group in optimizer.param_groups:
        frozen = group["last_layer"] and values.last_layer_frozen
        group["lr"] = 0.0 if frozen else values.lr * group["lr_mult"]
        group["weight_decay"] = values.weight_decay * group["wd_mult"]


@torch.no_grad()
def clip_per_module(
    modules: Mapping[str, Sequence[nn.Parameter]], max_norm: float
) -> dict[str, Tensor]:
    """Clip the gradient of each module, given by its parameters, to `max_norm` (0: only measure).

    Of sharded gradients each rank works on its pieces; the norm is of the whole.

    Returns:
        `grad_norm_<module>` before clipping, 0-d tensors on the device.
    """
    gradients = {
        name: [p.grad for p in parameters if p.grad is not None]
        for name, parameters in modules.items()
    }
    pieces = {name: [local_part(g) for g in found] for name, found in gradients.items()}
    norms = torch.stack([nn.utils.get_total_norm(own) for own in pieces.values()])
    if any(isinstance(g, DTensor) for found in gradients.values() for g in found):
        norms = all_sum(norms.square()).sqrt()
    if max_norm > 0:
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        for own, factor in zip(pieces.values(), factors.unbind(), strict=True):
            torch._foreach_mul_(own, factor)
    return {f"grad_norm_{name}": n for name, n in zip(pieces, norms.unbind(), strict=True)}
