"""A step in micro-batches has the losses and gradients of the step over the whole batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cytoray.errors import InputError
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    HeadConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    PretrainEngine,
    SRConfig,
    TwoViewConfig,
)

TILES = 7  # cut in three, the parts are of 2, 2 and 3 tiles
TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}
TWO_VIEWS = TwoViewConfig(hidden_dim=24, out_dim=12)
QUEUE = dataclasses.replace(TWO_VIEWS, queue_size=20)


def _config(method: str, **changes) -> PretrainConfig:
    values = {
        "precision": "fp32",
        "method": method,
        "two_views": TWO_VIEWS,
        "backbone": BackboneConfig(kwargs=dict(TINY), drop_path=0.3),
        "crops": CropConfig(global_px=64, local_px=32, num_local=2),
        "head": HeadConfig(out_dim=48, hidden_dim=32, bottleneck_dim=16),
        "optim": OptimConfig(lr=0.01, warmup_steps=1, freeze_last_layer_steps=0, clip_grad=0.0),
        "batch_size": TILES,
        "total_steps": 20,
    }
    if method in ("simclr", "moco", "byol"):
        values["crops"] = CropConfig(global_px=64, num_local=0)
    return PretrainConfig(**(values | changes))


CASES = {
    "dinov2": _config("dinov2"),
    "ibot": _config("ibot"),
    "dino": _config("dino"),
    "dinov2 without masks in most parts": _config("dinov2", loss=LossConfig(mask_share=0.1)),
    "simclr": _config("simclr"),
    "moco": _config("moco"),
    "moco queue": _config("moco", two_views=QUEUE),
    "byol": _config("byol"),
    "sparse": _config(
        "dinov2",
        backbone=BackboneConfig(
            kwargs=dict(TINY), drop_path=0.3, sr=SRConfig(sparse=True, irpe=True, top_h=3)
        ),
        checkpoint_blocks=True,
    ),
}


def _batch(config: PretrainConfig, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    batch = {"global_crops": torch.randn(TILES, 2, 3, 64, 64, generator=generator)}
    if config.crops.num_local:
        batch["local_crops"] = torch.randn(TILES, 2, 3, 32, 32, generator=generator)
    return batch


def _gradients(config: PretrainConfig) -> tuple[dict, dict, dict]:
    """Metrics and gradients of the second step, and the state of what the method remembers."""
    engine = PretrainEngine(config, "cpu")
    engine.step(_batch(config, 0), 0)
    found = {}

    def look(*_):
        for name, parameter in engine.method.student.named_parameters():
            found[name] = None if parameter.grad is None else parameter.grad.clone()

    engine.optimizer.register_step_pre_hook(look)  # they are gone when the step is done
    metrics = engine.step(_batch(config, 1), 1)
    return metrics, found, dict(engine.method.named_buffers())


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_that_of_the_whole_batch(name):
    whole = _gradients(CASES[name])
    parts = _gradients(dataclasses.replace(CASES[name], accumulate=3))
    for kind, got, expected in zip(("metric", "gradient", "buffer"), parts, whole, strict=True):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            if value is None:
                assert got[key] is None
                continue
            torch.testing.assert_close(
                got[key], value, atol=1e-5, rtol=1e-5, msg=lambda m, k=key, w=kind: f"{w} {k}: {m}"
            )
    assert any(value is not None and value.abs().max() > 1e-3 for value in whole[1].values())


def test_a_last_batch_smaller_than_the_micro_batches_is_used():
    small = {name: crops[:3] for name, crops in _batch(CASES["dino"], 0).items()}
    losses = [
        PretrainEngine(dataclasses.replace(CASES["dino"], accumulate=parts), "cpu").step(small, 0)
        for parts in (1, 7)
    ]
    torch.testing.assert_close(losses[1]["loss"], losses[0]["loss"], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="accumulate must be between 1 and batch_size 7"):
        dataclasses.replace(CASES["dino"], accumulate=8)
