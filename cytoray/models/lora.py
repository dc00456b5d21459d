"""LoRA on the attention (query and value by default) and MLP of a timm ViT (Dausort et al., eq. 2).

timm keeps query, key and value in one Linear; adapting that one gives q, k and v a single shared
A and changes k too. So qkv is first split into three Linears, which `peft` then adapts one by one,
and the merged weights are fused back under timm's own keys. `peft` is imported when a model is
adapted: that takes seconds, which no other command should wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cytoray.errors import InputError, choose

ADAPTER = "default"
# Where a target is: inside the attention (o: its output projection), or the MLP beside it.
TARGETS = {"q": "qkv.q", "k": "qkv.k", "v": "qkv.v", "o": "proj", "mlp": "mlp"}


class SplitQKV(nn.Module):
    """Three Linears in place of timm's fused qkv: same input, same (..., 3 * D) output.

    Args:
        fused: Linear from D_in to 3 * D whose rows are query, key and value in this order.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = fused.in_features, fused.out_features
        self.q, self.k, self.v = (_third_of(fused, position) for position in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) to (..., 3 * D): query, key, value side by side."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def _third_of(fused: nn.Linear, position: int) -> nn.Linear:
    """Query (0), key (1) or value (2) of a fused qkv Linear, as a Linear of its own."""
    dim = fused.out_features // 3
    rows = slice(position * dim, (position + 1) * dim)
    like = {"device": fused.weight.device, "dtype": fused.weight.dtype}
    linear = nn.Linear(fused.in_features, dim, bias=fused.bias is not None, **like)
    with torch.no_grad():
        linear.weight.copy_(fused.weight[rows])
        if fused.bias is not None:
            linear.bias.copy_(fused.bias[rows])
    return linear


def _attention_names(vit: nn.Module) -> list[str]:
    """Names of the attention modules that hold a qkv, fused or already split."""
    names, problems = [], []
    for name, module in vit.named_modules():
        qkv = getattr(module, "qkv", None)
        if not isinstance(qkv, nn.Linear | SplitQKV):
            continue
        if getattr(module, "q_bias", None) is not None or qkv.out_features % 3:
            problems.append(f"{name} ({type(module).__name__})")
        names.append(name)
    if problems or not names:
        where = f"; in the way: {', '.join(problems)}" if problems else ""
        raise InputError(
            f"LoRA needs a ViT whose attention blocks hold one `qkv` Linear with its own bias; "
            f"{type(vit).__name__} does not{where}. Use a timm ViT such as vit_small_patch16_224"
        )
    return names


def split_qkv(vit: nn.Module) -> nn.Module:
    """Replace every fused qkv Linear of a timm ViT by three Linears, in place; outputs are equal.

    Returns:
        `vit`.

    Raises:
        InputError: the model has no attention block with a fused qkv Linear.
    """
    for name in _attention_names(vit):
        attention = vit.get_submodule(name)
        if isinstance(attention.qkv, nn.Linear):
            attention.qkv = SplitQKV(attention.qkv)
    return vit


def _adapted_names(vit: nn.Module, targets: Sequence[str], last_blocks: int = 0) -> list[str]:
    """Names of the Linears that the targets stand for, in a model whose qkv is split."""
    names, attentions = [], _attention_names(vit)
    if last_blocks > len(attentions):
        raise InputError(
            f"LoRA on the last {last_blocks} blocks: {type(vit).__name__} has {len(attentions)}; "
            "0 means all"
        )
    for attention in attentions[-last_blocks:]:
        names += [f"{attention}.{TARGETS[target]}" for target in targets if target != "mlp"]
        if "mlp" in targets:
            names += _mlp_names(vit, f"{attention.rpartition('.')[0]}.mlp".lstrip("."))
    return names


def _mlp_names(vit: nn.Module, mlp: str) -> list[str]:
    """Names of the Linears of one MLP."""
    names = [
        name
        for name, module in vit.named_modules()
        if name.startswith(f"{mlp}.") and isinstance(module, nn.Linear)
    ]
    if not names:
        raise InputError(
            f"LoRA target 'mlp': {type(vit).__name__} has no `{mlp}` with Linears; "
            "leave `mlp` out of the targets"
        )
    return names


def check_lora(vit: nn.Module, targets: Sequence[str], last_blocks: int = 0) -> None:
    """See that LoRA can be added to a model, without touching it.

    Raises:
        InputError: it cannot; see `add_lora`.
    """
    if not targets:
        raise InputError(f"LoRA needs at least one target; valid: {', '.join(TARGETS)}")
    for target in targets:
        choose("LoRA target", target, TARGETS)
    _adapted_names(vit, targets, last_blocks)


def add_lora(
    vit: nn.Module,
    rank: int,
    targets: Sequence[str] = ("q", "v"),
    alpha: float = 1.0,
    dropout: float = 0.25,
    last_blocks: int = 0,
) -> nn.Module:
    """Freeze a timm ViT and add low-rank updates to its attention blocks, in place.

    h = Wx + alpha / sqrt(rank) * B A x, with A Kaiming-initialised and B zero, so that the output
    does not change until B does. Rank 0 only freezes the model.

    Args:
        vit: a timm ViT.
        rank: of the updates, at least 0.
        targets: any of `q`, `k`, `v`, `o` (the output projection) and `mlp` (its Linears).
        alpha: scale.
        dropout: on the input of A, in training mode.
        last_blocks: adapt the last so many blocks; 0: all.

    Returns:
        `vit`.

    Raises:
        InputError: a bad rank or target, more blocks than there are, a model without fused qkv, or
            one already adapted.
    """
    if rank < 0:
        raise InputError(f"LoRA rank {rank} is negative; 0 means no adaptation")
    check_lora(vit, targets, last_blocks)
    if lora_layers(vit):
        raise InputError("this model already has LoRA layers; merge them or load it anew")
    vit.requires_grad_(False)
    if rank == 0:
        return vit
    from peft import LoraConfig, inject_adapter_in_model

    split_qkv(vit)
    modules = _adapted_names(vit, targets, last_blocks)
    options: dict[str, Any] = {"lora_alpha": alpha, "use_rslora": True}
    config = LoraConfig(r=rank, target_modules=modules, lora_dropout=dropout, **options)
    inject_adapter_in_model(config, vit, ADAPTER)
    set_lora_training(vit, vit.training)  # new layers come in training mode, dropout on
    return vit


def is_adapted(module: nn.Module) -> bool:
    """Whether `module` is a Linear that `peft` has given an A and a B."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def lora_layers(vit: nn.Module) -> dict[str, Any]:
    """The adapted Linears (`peft` layers) by name."""
    return {name: module for name, module in vit.named_modules() if is_adapted(module)}


def set_lora_training(vit: nn.Module, training: bool) -> None:
    """Switch LoRA's dropout on or off, leaving the rest of the model in its mode."""
    for layer in lora_layers(vit).values():
        layer.lora_dropout.train(training)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters an optimiser would change, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def lora_state_dict(vit: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted Linear, by name; empty for rank 0."""
    return {
        f"{name}.{matrix}": getattr(layer, f"lora_{matrix}")[ADAPTER].weight.detach().clone()
        for name, layer in lora_layers(vit).items()
        for matrix in "AB"
    }


def load_lora_state(vit: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy what `lora_state_dict` gave into a model with the same LoRA layers.

    Raises:
        InputError: the layers or the rank differ.
    """
    layers = lora_layers(vit)
    expected = {f"{name}.{matrix}" for name in layers for matrix in "AB"}
    if expected != set(state):
        raise InputError(
            f"these LoRA weights ({len(state)} tensors) do not fit this model "
            f"({len(expected)} tensors): load them into the encoder and targets they come from"
        )
    with torch.no_grad():
        for key, value in state.items():
            name, matrix = key.rsplit(".", 1)
            weight = getattr(layers[name], f"lora_{matrix}")[ADAPTER].weight
            if weight.shape != value.shape:
                raise InputError(
                    f"LoRA weight {key} is {tuple(value.shape)}, the model's is "
                    f"{tuple(weight.shape)}: the ranks or the encoders differ"
                )
            weight.copy_(value)


def _linear_state(linear: Any) -> dict[str, Tensor]:
    """Weight and bias of a Linear, with its LoRA update added if it has one."""
    if not is_adapted(linear):
        return {key: value.detach().clone() for key, value in linear.state_dict().items()}
    state = _linear_state(linear.get_base_layer())
    a, b = linear.lora_A[ADAPTER].weight, linear.lora_B[ADAPTER].weight
    update = (b @ a).detach() * linear.scaling[ADAPTER]
    state["weight"] += update.to(state["weight"].dtype)
    return state


def merge_lora(vit: nn.Module) -> dict[str, Tensor]:
    """The adapted model's weights under timm's own keys: W + scale * B A, qkv fused back.

    The model itself is not changed; load the result into a plain timm model.
    """
    owners: dict[str, dict[str, Tensor]] = {}
    for name, module in vit.named_modules():
        if isinstance(module, SplitQKV):
            parts = [_linear_state(module.get_submodule(part)) for part in "qkv"]
            owners[name] = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        elif is_adapted(module) and not any(name.startswith(f"{o}.") for o in owners):
            owners[name] = _linear_state(module)
    merged: dict[str, Tensor] = {}
    for key, value in vit.state_dict().items():
        owner = next((name for name in _parents(key) if name in owners), None)
        if owner is None:
            merged[key] = value.detach().clone()
        else:
            merged.update({f"{owner}.{leaf}": tensor for leaf, tensor in owners[owner].items()})
    return merged


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
