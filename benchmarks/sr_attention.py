"""What SR-attention costs: forward and backward of a ViT block, beside timm's with SDPA.

    python -m benchmarks.sr_attention [--model vit_tiny_patch16_224] [--threads 1] [--rounds 15]
        [--device cpu] [--bf16] [--compile]

The same block and tokens for every form, in turn within a round; each ratio is the median over the
rounds of (form / SDPA), below 1 where the form is faster. With one CPU thread the clock is that of
the process, so that other work on the machine counts little. The last line is JSON; keys end in
the number of tokens (197: a crop of 224 px, 37: one of 96 px, both with a class token).
sdpa_ms: the plain block; sr, sparse, irpe: both parts, top-h only, relative positions only.
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

from cytoray.models.sr_transformer import use_sr

CROPS_PX = {224: 8, 96: 32}  # side: crops in a batch
FORMS = {
    "sdpa": {"irpe": False, "sparse": False},
    "sparse": {"irpe": False, "sparse": True},
    "irpe": {"irpe": True, "sparse": False},
    "sr": {"irpe": True, "sparse": True},
}


def blocks_of(vit: nn.Module, *, compiled: bool) -> dict[str, nn.Module]:
    """The first block of a ViT in every form, with the same weights."""
    forms = {name: use_sr(copy.deepcopy(vit), **parts) for name, parts in FORMS.items()}
    blocks = {name: form.get_submodule("blocks.0") for name, form in forms.items()}
    for block in blocks.values():
        if compiled:
            block.compile()
    return blocks


def step_of(block: nn.Module, tokens: Tensor, *, bf16: bool) -> Callable[[], None]:
    """Forward and backward of a block on `tokens`, float (B, N, D)."""
    kind = tokens.device.type
    weight = torch.randn_like(tokens)

    def step() -> None:
        with torch.autocast(kind, torch.bfloat16) if bf16 else nullcontext():
            out = block(tokens)
        out.backward(weight)
        tokens.grad = None
        block.zero_grad(set_to_none=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    one_thread = options.device == "cpu" and options.threads == 1
    clock = time.process_time if one_thread else time.perf_counter
    torch.manual_seed(0)
    vit = cast(Any, timm.create_model(options.model, num_classes=0, depth=1))
    blocks = blocks_of(vit.to(options.device).train(), compiled=options.compile)
    result: dict[str, float | str] = {"device": options.device, "model": options.model}
    for side_px, crops in CROPS_PX.items():
        count = 1 + (side_px // 16) ** 2
        tokens = torch.randn(crops, count, vit.embed_dim, device=options.device, requires_grad=True)
        steps = {k: step_of(block, tokens, bf16=options.bf16) for k, block in blocks.items()}
        measured = milliseconds(steps, options.rounds, clock)
        result[f"sdpa_ms_{count}"] = round(float(np.median(measured["sdpa"])), 2)
        for name in ("sparse", "irpe", "sr"):
            ratio = float(np.median(measured[name] / measured["sdpa"]))
            result[f"{name}_vs_sdpa_{count}"] = round(ratio, 3)
        print({k: round(float(np.median(v)), 2) for k, v in measured.items()}, "ms,", count)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
