"""What SR-attention costs: a training step with it, beside the same step with timm's SDPA.

    python -m benchmarks.sr_attention [--models NAME ...] [--sizes-px 224 96] [--depth 1]
        [--crops 8] [--threads 1] [--rounds 7] [--device cpu] [--no-bf16] [--compile] [--no-plain]

Without arguments: on a CUDA device ViT-S and ViT-B whole, at 197 and 257 tokens, in bf16, 128 crops
at once; else a ViT-tiny of one block, at 197 and 37 tokens, in fp32, 8 crops.
A step is forward, backward and a fused AdamW update of a model on images. Every form has the same
weights and images and takes its turn in every round; a ratio is the median over the rounds. With
one CPU thread the clock is that of the process, so that other work on the machine counts little.
The last line is JSON; keys end in the model and the number of tokens. sdpa_ms: the plain step;
sr, sparse, irpe: both parts, top-h only, relative positions only, over the plain step; torch: `sr`
without kernels; fast_vs_plain: `sr` over the same written out by the definition. sr_vs_sdpa is the
largest of its kind.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import timm
import torch
from torch import Tensor, nn

from cytoray.compilation import allow_many_codes
from cytoray.models.sr_transformer import use_sr

FORMS: dict[str, dict[str, Any]] = {
    "sdpa": {"irpe": False, "sparse": False},
    "sparse": {"irpe": False, "sparse": True},
    "irpe": {"irpe": True, "sparse": False},
    "sr": {"irpe": True, "sparse": True},
    "torch": {"irpe": True, "sparse": True, "form": "torch"},
    "plain": {"irpe": True, "sparse": True, "form": "plain"},
}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "models": ["vit_tiny_patch16_224"],
        "sizes_px": [224, 96],
        "depth": 1,
        "crops": 8,
        "bf16": False,
    },
    "cuda": {
        "models": ["vit_small_patch16_224", "vit_base_patch16_224"],
        "sizes_px": [224, 256],
        "depth": 12,
        "crops": 128,
        "bf16": True,
    },
}


def forms_of(vit: nn.Module, names: list[str], *, compiled: bool) -> dict[str, nn.Module]:
    """A ViT in every form, with the same weights."""
    if compiled:
        allow_many_codes()
    forms = {name: use_sr(copy.deepcopy(vit), **FORMS[name]) for name in names}
    for form in forms.values():
        for block in cast(Any, form).blocks if compiled else ():
            block.compile()
    return forms


def step_of(vit: nn.Module, images: Tensor, *, bf16: bool) -> Callable[[], None]:
    """A training step on `images`, float (B, 3, H, W)."""
    kind = images.device.type
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(kind, torch.bfloat16) if bf16 else nullcontext():
            out = vit(images)
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if kind == "cuda":
            torch.cuda.synchronize()

    return step


def milliseconds(
    steps: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, np.ndarray]:
    """Milliseconds of every step in every round, after two rounds to warm up."""
    measured: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            start = clock()
            step()
            measured[name].append(1e3 * (clock() - start))
    return {name: np.array(values[2:]) for name, values in measured.items()}


def measure(name: str, size_px: int, options: argparse.Namespace) -> dict[str, float]:
    """Ratios of a model on crops of a size."""
    torch.manual_seed(0)
    vit = cast(Any, timm.create_model(name, num_classes=0, depth=options.depth, img_size=size_px))
    left_out = {"torch"} if options.device == "cpu" else set()  # there `sr` is that form
    if not options.plain:
        left_out.add("plain")
    names = [form for form in FORMS if form not in left_out]
    forms = forms_of(vit.to(options.device).train(), names, compiled=options.compile)
    images = torch.randn(options.crops, 3, size_px, size_px, device=options.device)
    steps = {form: step_of(model, images, bf16=options.bf16) for form, model in forms.items()}
    one_thread = options.device == "cpu" and options.threads == 1
    clock = time.process_time if one_thread else time.perf_counter
    measured = milliseconds(steps, options.rounds, clock)
    tokens = vit.num_prefix_tokens + vit.patch_embed.num_patches
    end = f"{name.split('_patch')[0]}_{tokens}"
    shown = {form: round(float(np.median(values)), 2) for form, values in measured.items()}
    print(shown, "ms,", end)
    ratios = {f"sdpa_ms_{end}": shown["sdpa"]}
    for form in ("sparse", "irpe", "sr", "torch"):
        if form in measured:
            ratio = float(np.median(measured[form] / measured["sdpa"]))
            ratios[f"{form}_vs_sdpa_{end}"] = round(ratio, 3)
    if "plain" in measured:
        ratio = float(np.median(measured["sr"] / measured["plain"]))
        ratios[f"fast_vs_plain_{end}"] = round(ratio, 3)
    return ratios


def parsed() -> argparse.Namespace:
    """The arguments, completed by the preset of the device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--sizes-px", nargs="+", type=int)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--crops", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction)
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    # The definition stores N * N * d numbers a head: too many for whole models.
    preset = PRESETS[options.device] | {"plain": options.device == "cpu"}
    for name, value in preset.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    result: dict[str, Any] = {"device": device, "bf16": options.bf16, "depth": options.depth}
    for name in options.models:
        for size_px in options.sizes_px:
            result |= measure(name, size_px, options)
    result["sr_vs_sdpa"] = max(v for k, v in result.items() if k.startswith("sr_vs_sdpa_"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
