"""A DINOv2 training step: ours against the same recipe made of lightly's parts, and of the peak.

    python -m benchmarks.pretrain_step [--backbones vit_tiny_patch16_224 ...] [--batch 8]
        [--precisions auto ...] [--out-dim 65536] [--depth N] [--rounds 5] [--device cpu|cuda]
        [--no-lightly] [--profile]

Both take the same rendered crops (2 x 224 and 8 x 96 px), block masks for half of the global ones,
the losses DINO + iBOT + 0.1 KoLeo with centring (lightly has no Sinkhorn), AdamW, an EMA teacher;
no drop path. Steps are taken in turn, ours with SR-attention among them, all in the same precision:
the default of a pretraining (bf16 where the device has it in hardware), then fp32. lightly is a
development dependency: without it ours is measured alone. On CUDA the backbones are ViT-S, B and L
in bf16 (ours with compiled blocks and packed crops), lightly stands beside the first, one is
measured after the other, four steps in a row with nothing waited for between, as in a run, and the
profile is shown. The last line is JSON: of the first backbone in the first precision vs_lightly,
the median ratio of seconds (above 1, ours is faster; null where it found no room), tiles_per_s and
mfu, the share of the device's dense bf16 peak that the recipe's operations make up (null where the
peak is not known); sr_vs_plain, the median ratio of a step with SR-attention to one without;
host_ms, what the host needs to launch a step (as long as the step itself: the device waits for the
host, so take larger batches); device; and the same of every backbone and precision.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from cytoray.precision import PRECISIONS, autocast, resolve_precision
from cytoray.training import (
    BackboneConfig,
    HeadConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    PretrainEngine,
    SRConfig,
)
from cytoray.training.costs import peak_flops, step_costs

try:
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import random_block_mask, update_momentum

    HAS_LIGHTLY = True
except ImportError:
    HAS_LIGHTLY = False

Step = Callable[[int], Any]
TINY = "vit_tiny_patch16_224"
STEPS_CUDA = 4  # of a round
# Tiles a step that fill a large GPU.
BATCH_CUDA = {
    "vit_small_patch16_224": 256,
    "vit_base_patch16_224": 128,
    "vit_large_patch16_224": 64,
}


@dataclass(frozen=True)
class Measured:
    """Seconds a step of each round, and milliseconds until a step is launched."""

    seconds: np.ndarray
    host_ms: float


def crops(config: PretrainConfig, device: torch.device) -> dict[str, Tensor]:
    """Random crops of a batch; what they show does not matter to the time."""
    torch.manual_seed(0)
    c, b = config.crops, config.batch_size
    return {
        "global_crops": torch.randn(b, c.num_global, 3, c.global_px, c.global_px, device=device),
        "local_crops": torch.randn(b, c.num_local, 3, c.local_px, c.local_px, device=device),
    }


def our_step(config: PretrainConfig, device: torch.device) -> Step:
    """A step of the engine."""
    engine = PretrainEngine(config, device)
    batch = crops(config, device)
    return lambda number: engine.step(batch, number)


class LightlyRecipe(nn.Module):
    """Student and teacher of lightly's modules, put together as its DINOv2 example describes."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        options: Any = config.backbone.kwargs
        vit = timm.create_model(
            config.backbone.name, dynamic_img_size=True, num_classes=0, **options
        )
        self.backbone = MaskedVisionTransformerTIMM(vit=vit, antialias=False)  # type: ignore[arg-type]
        head = config.head
        self.head = DINOv2ProjectionHead(
            int(vit.embed_dim),  # type: ignore[arg-type]
            head.hidden_dim,
            head.bottleneck_dim,
            head.out_dim,
        )

    def forward(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class tokens (n, D) and all tokens (n, 1 + N, D)."""
        tokens = self.backbone.encode(images, mask=mask)
        return tokens[:, 0], tokens


def lightly_step(config: PretrainConfig, device: torch.device) -> Step:
    """The same step from lightly's parts."""
    student = LightlyRecipe(config).to(device)
    teacher = LightlyRecipe(config).to(device).requires_grad_(False).eval()
    teacher.load_state_dict(student.state_dict())  # its normed weights cannot be deep-copied
    dino = DINOLoss(output_dim=config.head.out_dim).to(device)
    ibot = IBOTPatchLoss(output_dim=config.head.out_dim).to(device)
    koleo = KoLeoLoss()
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=fused or None)
    batch = crops(config, device)
    big = batch["global_crops"].transpose(0, 1).flatten(0, 1)  # view by view, as lightly has it
    small = batch["local_crops"].transpose(0, 1).flatten(0, 1)
    views, locals_ = config.crops.num_global, config.crops.num_local
    side = config.crops.global_px // student.backbone.vit.patch_embed.patch_size[0]

    def step(number: int) -> Tensor:
        mask = big.new_zeros((len(big), 1 + side * side), dtype=torch.bool)
        blocks = random_block_mask(size=(len(big), side, side), device=device)
        mask[:, 1:] = blocks.flatten(1)
        with autocast(config.precision, device):
            with torch.no_grad():
                teacher_cls, tokens = teacher(big, None)
                targets = teacher.head(teacher_cls)
                patch_targets = teacher.head(tokens[mask])
            cls, tokens = student(big, mask)
            patch_logits = student.head(tokens[mask])
            local_cls, _ = student(small, None)
            logits = [*student.head(cls).chunk(views), *student.head(local_cls).chunk(locals_)]
            loss = dino(list(targets.chunk(views)), logits, teacher_temp=0.07)
            loss = loss + ibot(patch_targets, patch_logits, blocks, teacher_temp=0.07)
            loss = loss + 0.1 * sum(koleo(part) for part in cls.chunk(views))
        loss.backward()
        for module in (student.backbone, student.head):
            torch.nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_momentum(student.backbone, teacher.backbone, m=0.99)
        update_momentum(student.head, teacher.head, m=0.99)
        return loss.detach()

    return step


def measure(builds: dict[str, Callable[[], Step]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every step, interleaved on a CPU: name to (rounds,), after one round."""
    steps = {name: build() for name, build in builds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step(number)
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def measure_cuda(build: Callable[[], Step], rounds: int, *, profiled: bool) -> Measured | None:
    """Steps on a CUDA device, which has room for one network at a time; None: not even that."""
    try:
        step = build()
        for number in range(3):
            step(number)
        seconds, host = [], []
        for _ in range(rounds):
            torch.cuda.synchronize()
            began = time.perf_counter()
            step(3)
            host.append(time.perf_counter() - began)
            for number in range(1, STEPS_CUDA):
                step(3 + number)
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - began) / STEPS_CUDA)
        if profiled:
            show_profile(step, torch.device("cuda"))
    except torch.OutOfMemoryError:
        return None
    finally:
        step = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()
    return Measured(np.array(seconds), 1e3 * float(np.median(host)))


def show_profile(step: Step, device: torch.device) -> None:
    """Print where the time of a step goes."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        step(1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    by = f"self_{device.type}_time_total"
    print(profile.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60))


def settings(
    backbone: str, options: argparse.Namespace, device: torch.device, precision: Any = "auto"
) -> PretrainConfig:
    """The recipe on one backbone."""
    batch = options.batch or (BATCH_CUDA.get(backbone, 32) if device.type == "cuda" else 8)
    return PretrainConfig(
        backbone=BackboneConfig(
            name=backbone,
            drop_path=0.0,
            kwargs={"depth": options.depth} if options.depth else {},
        ),
        head=HeadConfig(out_dim=options.out_dim),
        loss=LossConfig(centering="centering"),
        optim=OptimConfig(warmup_steps=1, freeze_last_layer_steps=0),
        precision=precision,
        batch_size=batch,
        total_steps=1000,
    )


def measure_backbone(
    config: PretrainConfig,
    options: argparse.Namespace,
    device: torch.device,
    *,
    beside_lightly: bool,
) -> dict[str, float | None]:
    """Speed of one backbone in one precision, and a table on the way."""
    with_sr = replace(config.backbone, sr=SRConfig(sparse=True, irpe=True))
    builds: dict[str, Callable[[], Step]] = {
        "ours": lambda: our_step(config, device),
        "with SR": lambda: our_step(replace(config, backbone=with_sr), device),
    }
    if beside_lightly:
        builds["lightly's parts"] = lambda: lightly_step(config, device)
    threads = f"{torch.get_num_threads()} threads, " if device.type == "cpu" else ""
    precision = resolve_precision(config.precision, device)
    print(f"{config.backbone.name}, {config.batch_size} tiles, {precision}, {threads}{device}")
    host_ms = None
    if device.type == "cuda":
        seconds = {}
        for name, build in builds.items():
            shown = name == "ours" or (options.profile and name == "with SR")
            measured = measure_cuda(build, options.rounds, profiled=shown)
            if measured is None:
                print(f"{name:16s} out of memory")
                continue
            seconds[name] = measured.seconds
            host_ms = round(measured.host_ms, 1) if name == "ours" else host_ms
    else:
        seconds = measure(builds, options.rounds)
        if options.profile:
            show_profile(builds["ours"](), device)
    for name, values in seconds.items():
        print(f"{name:16s} {1e3 * np.median(values):9.1f} ms a step")
    if "ours" not in seconds:
        return dict.fromkeys(("vs_lightly", "tiles_per_s", "mfu", "sr_vs_plain", "host_ms"))
    speed, peak = config.batch_size / float(np.median(seconds["ours"])), peak_flops(device)

    def ratio(name: str) -> float | None:
        other = seconds.get(name)
        return None if other is None else round(float(np.median(other / seconds["ours"])), 3)

    return {
        "vs_lightly": ratio("lightly's parts"),
        "tiles_per_s": round(speed, 2),
        "mfu": round(step_costs(config).flops_per_tile * speed / peak, 4) if peak else None,
        "sr_vs_plain": ratio("with SR"),
        "host_ms": host_ms,
    }


def main() -> None:
    """Measure, print tables, and a line of JSON."""
    parser = argparse.ArgumentParser(description="A DINOv2 step, side by side.")
    parser.add_argument("--backbones", nargs="+", help="timm names; default: as the device")
    parser.add_argument("--batch", type=int, help="tiles a step; default: 8 on a CPU")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="default: see above")
    parser.add_argument("--out-dim", type=int, default=65536)
    parser.add_argument("--depth", type=int, help="fewer blocks, to try the benchmark itself")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-lightly", action="store_true", help="measure ours alone")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()
    device = torch.device(options.device)
    names = options.backbones or (list(BATCH_CUDA) if device.type == "cuda" else [TINY])
    wanted = options.precisions or (["auto"] if device.type == "cuda" else ["auto", "fp32"])
    precisions = list(dict.fromkeys(resolve_precision(name, device) for name in wanted))
    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        beside = HAS_LIGHTLY and not options.no_lightly and number == 0
        for precision in precisions:
            config = settings(name, options, device, precision)
            speeds = measure_backbone(config, options, device, beside_lightly=beside)
            found.setdefault(name, {})[precision] = speeds
    shown = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    first = found[names[0]][precisions[0]]
    print(json.dumps({**first, "precision": precisions[0], "device": shown, "backbones": found}))


if __name__ == "__main__":
    main()
