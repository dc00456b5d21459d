"""Tiles a second that one GPU trains on or embeds: given, measured here, or bounded by FLOPs."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cytoray.device_peaks import PEAK_FLOPS
from cytoray.models.backbones import build_backbone
from cytoray.perturb import CROP_POLICIES, CropPolicy, sample_views, tile_rng
from cytoray.training import PretrainConfig
from cytoray.training.engine import PretrainEngine


@dataclass(frozen=True, kw_only=True)
class DeviceRate:
    """Tiles a second of one GPU, and what that figure is.

    Attributes:
        tiles_per_s: of one GPU.
        source: `given`, `measured` or `bound`. A bound is what the device's peak FLOPs allow: no
            real run reaches it, so it is no estimate.
        what: in words, e.g. on which device it was measured.
    """

    tiles_per_s: float
    source: str
    what: str

    @property
    def is_bound(self) -> bool:
        """Whether it is a bound only."""
        return self.source == "bound"


def crop_flops(name: str, crop_px: int, config: PretrainConfig) -> int:
    """Floating point operations of one crop's forward pass through a backbone.

    Counted by running it without memory (meta device): a multiplication and an addition are two.
    """
    with torch.device("meta"):
        model = build_backbone(name, img_px=config.crops.global_px, kwargs=config.backbone.kwargs)
        image = torch.empty(1, 3, crop_px, crop_px)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


def flops_per_tile(config: PretrainConfig) -> float:
    """FLOPs of the backbones for one training tile, heads and optimiser left out.

    The student sees all crops, forward and backward (3 forwards' worth); the teacher, or the second
    network of a two-view method, sees the global ones, forward.
    """
    crops = config.crops
    big = crop_flops(config.backbone.name, crops.global_px, config)
    small = crop_flops(config.backbone.name, crops.local_px, config) if crops.num_local else 0
    student = crops.num_global * big + crops.num_local * small
    teacher = 0 if config.method == "simclr" else crops.num_global * big
    return 3.0 * student + teacher


def bound_rate(flops: float, gpu_model: str) -> DeviceRate:
    """The bound that the peak FLOPs of a GPU set."""
    peak = PEAK_FLOPS[gpu_model]
    return DeviceRate(
        tiles_per_s=peak / flops,
        source="bound",
        what=f"a bound, not an estimate: {flops / 1e9:,.0f} GFLOP a tile at the peak of "
        f"{peak / 1e12:,.0f} TFLOP/s of an {gpu_model}",
    )


def device_name() -> tuple[str, str]:
    """(torch's name, a person's name) of the device of this machine."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    return "cpu", f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def measure_training(config: PretrainConfig, tile_px: int, batch: int, steps: int) -> DeviceRate:
    """Train a few steps on random tiles on this machine's device.

    Args:
        config: the run; its batch is replaced by `batch` tiles.
        tile_px: side of a tile.
        batch: tiles a step, the share of one GPU.
        steps: measured, after two that warm up.
    """
    device, name = device_name()
    engine = PretrainEngine(config, device)
    rng = np.random.default_rng(0)
    policy = CROP_POLICIES[config.method]
    views = np.stack(
        [_views(policy, config, tile_px, tile_rng(0, 0, str(i))) for i in range(batch)]
    )
    pixels = rng.integers(0, 256, (batch, tile_px, tile_px, 3), np.uint8)
    data = {"pixels": torch.from_numpy(pixels), "views": torch.from_numpy(views)}
    for step in range(2):
        engine.step(data, step)
    _wait(device)
    began = time.perf_counter()
    for step in range(2, 2 + steps):
        engine.step(data, step)
    _wait(device)
    rate = batch * steps / (time.perf_counter() - began)
    return DeviceRate(
        tiles_per_s=rate, source="measured", what=f"measured here: {steps} steps of {batch}, {name}"
    )


def measure_encoder(name: str, tile_px: int, batch: int, steps: int) -> DeviceRate:
    """Embed random tiles on this machine's device with a timm backbone of random weights."""
    device, shown = device_name()
    model = build_backbone(name, img_px=tile_px).to(device).eval()
    images = torch.rand(batch, 3, tile_px, tile_px, device=device)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        model(images)
        _wait(device)
        began = time.perf_counter()
        for _ in range(steps):
            model(images)
        _wait(device)
    rate = batch * steps / (time.perf_counter() - began)
    return DeviceRate(
        tiles_per_s=rate, source="measured", what=f"measured here: {steps} x {batch}, {shown}"
    )


def _views(
    policy: CropPolicy, config: PretrainConfig, tile_px: int, rng: np.random.Generator
) -> np.ndarray:
    crops = config.crops
    mine = replace(policy, num_global=crops.num_global, num_local=crops.num_local)
    return sample_views(np.zeros((0, 2), np.float32), tile_px, mine, rng)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
