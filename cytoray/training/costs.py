"""What a training step costs, known before anything is allocated: parameters, FLOPs, memory.

The networks are run on tensors that have a shape and no data, so that even a ViT-g is described in
seconds on a laptop. FLOPs are counted, operation by operation; memory is what the optimiser and
the autograd graph hold, which is a lower bound of what a device needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cytoray.device_peaks import peak_of_device
from cytoray.models import sr_attention  # noqa: F401 (makes its operations known)
from cytoray.models.backbones import Backbone
from cytoray.ssl.methods import METHODS
from cytoray.training.config import PretrainConfig

# A training step goes forward once and backward at twice the cost; at once the cost through
# weights that stay as they are.
_TRAINING_PASSES = 3
_FROZEN_PASSES = 2
_ADAM_STATES = 2
_FP32_BYTES = 4


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """FLOPs of attention from the shapes of its inputs."""
    return sdpa_flop_count(q, k, v)


def _sr_attention_flops(q: Any, k: Any, v: Any, r_k: Any, *_: Any, **__: Any) -> int:
    """The same of SR-attention: each query, key and value meets every bucket's vector once."""
    crops, heads, tokens, width = q
    buckets = 0 if r_k is None else r_k[-2]
    return sdpa_flop_count(q, k, v) + 3 * 2 * crops * heads * tokens * width * buckets


# The CPU's own attention kernel and our operation, which the counter does not know by itself.
_MORE_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.cytoray.sr_attend: _sr_attention_flops,
}


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Costs of one tile and of the state of a run.

    Attributes:
        num_parameters: parameters that are trained.
        num_backbone_parameters: those of the encoder that is exported.
        flops_per_tile: floating-point operations of a training step for one tile (a
            multiply-add is two), as the recipe is published: the tokens of the last block that
            nothing asks for are counted, though the step leaves them out.
        state_bytes: weights of student and teacher, gradients and the optimiser's moments.
        activation_bytes_per_tile: what the autograd graph keeps for one tile.
    """

    num_parameters: int
    num_backbone_parameters: int
    flops_per_tile: int
    state_bytes: int
    activation_bytes_per_tile: int

    def memory_bytes(self, tiles: int, shards: int = 1) -> int:
        """Least memory of a device that trains on `tiles` tiles at once.

        Args:
            tiles: of a micro-batch.
            shards: devices that the state is cut over.
        """
        return self.state_bytes // shards + tiles * self.activation_bytes_per_tile


def step_costs(config: PretrainConfig, *, precision: str = "bf16") -> StepCosts:
    """Describe the training step of a run.

    Args:
        config: the run.
        precision: `bf16` or `fp32`, of the activations.
    """
    with torch.device("meta"):
        method = METHODS[config.method](config)
    held = sum(p.numel() for p in method.parameters())  # a base below LoRA counts once
    with FakeTensorMode(allow_non_fake_inputs=True):
        method.to_empty(device="cpu")
        trained = sum(p.numel() for p in method.student.parameters() if p.requires_grad)
        student = cast(Any, method.student)
        backbone = cast(Backbone, student.backbone)
        student_flops, kept = _crop_passes(config, student, backbone, precision, train=True)
        teacher_flops = 0
        if held > trained + _frozen(method.student):
            teacher_flops, _ = _crop_passes(config, student, backbone, precision, train=False)
    return StepCosts(
        num_parameters=trained,
        num_backbone_parameters=sum(p.numel() for p in backbone.model.parameters()),
        flops_per_tile=student_flops + teacher_flops,
        state_bytes=_FP32_BYTES * (held + (1 + _ADAM_STATES) * trained),
        activation_bytes_per_tile=kept,
    )


def _frozen(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not p.requires_grad)


def _crop_passes(
    config: PretrainConfig, student: Any, backbone: Backbone, precision: str, *, train: bool
) -> tuple[int, int]:
    """FLOPs of a step, and bytes kept for the backward pass, of all crops of one tile.

    The teacher (`train` False) sees the global crops alone.
    """
    crops = config.crops
    heads = [m for name, m in student.named_children() if name != "backbone"]
    flops, kept = 0, 0
    own, head_passes = 1, 1
    if train:
        own = _FROZEN_PASSES if config.backbone.lora.rank else _TRAINING_PASSES
        head_passes = _TRAINING_PASSES
    sizes = [(crops.num_global, crops.global_px)]
    if train and crops.num_local:
        sizes.append((crops.num_local, crops.local_px))
    for number, side_px in sizes:
        side = (3, side_px, side_px)
        found, saved = _per_tile(lambda x: backbone(x).cls, side, number, backbone, precision)
        flops, kept = flops + own * found, kept + saved
        for head in heads:
            if _takes(head, backbone.embed_dim):
                width = (backbone.embed_dim,)
                found, saved = _per_tile(head, width, number, head, precision)
                flops, kept = flops + head_passes * found, kept + saved
    if not train:
        kept = 0
    return flops + head_passes * _patch_head_flops(config, student, backbone), kept


def _takes(head: nn.Module, width: int) -> bool:
    """Whether a head works on the encoder's output (a predictor works on another head's)."""
    first = next((m for m in head.modules() if isinstance(m, nn.Linear)), None)
    return first is not None and first.in_features == width


def _patch_head_flops(config: PretrainConfig, student: Any, backbone: Backbone) -> int:
    """FLOPs of projecting the masked patches of one tile, of a method that masks."""
    head = getattr(student, "cls_head", None)
    if head is None or not _masks(config):
        return 0
    settings = config.loss
    patches = (config.crops.global_px // backbone.patch_px) ** 2
    ratio = (settings.mask_ratio_min + settings.mask_ratio_max) / 2
    masked = config.crops.num_global * settings.mask_share * ratio * patches
    flops, _ = _per_tile(head, (backbone.embed_dim,), 8, head, "fp32")
    return round(flops / 8 * masked)


def _masks(config: PretrainConfig) -> bool:
    if config.loss.ibot_weight is not None:
        return config.loss.ibot_weight > 0
    return config.method in ("dinov2", "ibot")


def _per_tile(
    run: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    number: int,
    module: nn.Module,
    precision: str,
) -> tuple[int, int]:
    """FLOPs of `run` on `number` inputs of a shape, and bytes that autograd keeps of them.

    What a call costs whatever its inputs (a normed weight, say) cancels out: the costs of so many
    inputs are taken from those of twice as many.
    """
    once, twice = (_count(run, torch.empty(n * number, *shape), module, precision) for n in (1, 2))
    return twice[0] - once[0], twice[1] - once[1]


def _count(
    run: Callable[[Tensor], Tensor], inputs: Tensor, module: nn.Module, precision: str
) -> tuple[int, int]:
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    inputs.requires_grad_(inputs.dim() == 2)  # pixels need no gradient, features do
    counter = FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAS)
    with counter, saved_tensors_hooks(keep, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            graph = run(inputs)  # held, so that no storage is freed and counted twice
        del graph
    return counter.get_total_flops(), sum(seen.values())


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a CUDA device, FLOP/s; None when it is not known."""
    if device.type != "cuda":
        return None
    return peak_of_device(torch.cuda.get_device_name(device))
