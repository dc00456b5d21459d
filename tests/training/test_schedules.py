import math
from dataclasses import replace

import pytest
import torch

from cytoray.training import CropConfig, LossConfig, OptimConfig, PretrainConfig
from cytoray.training.schedules import (
    cosine,
    linear,
    patch_teacher_temp,
    step_values,
    warmup_cosine,
)


def test_endpoints_and_middles():
    assert [linear(s, 0.04, 0.07, 10) for s in (0, 10, 99)] == [0.04, 0.07, 0.07]
    assert linear(5, 0.0, 1.0, 10) == 0.5
    assert linear(0, 0.0, 1.0, 0) == 1.0
    assert [cosine(s, 0.4, 0.04, 8) for s in (0, 8, 20)] == [0.4, 0.04, 0.04]
    assert cosine(4, 0.0, 1.0, 8) == pytest.approx(0.5)
    assert cosine(2, 1.0, 0.0, 8) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    values = [warmup_cosine(s, 1.0, 0.1, warmup=4, total=12) for s in range(13)]
    assert values[0] == 0.0
    assert values[2] == 0.5
    assert values[4] == max(values) == 1.0
    assert values[8] == pytest.approx(0.55)
    assert values[12] == pytest.approx(0.1)
    assert warmup_cosine(0, 1.0, 0.1, warmup=0, total=12) == 1.0


def test_a_run():
    config = PretrainConfig(
        batch_size=256,
        total_steps=1000,
        crops=CropConfig(),
        optim=OptimConfig(lr=4e-3, warmup_steps=100, freeze_last_layer_steps=10),
        loss=LossConfig(teacher_temp_warmup_steps=300),
    )
    first, peak, last = (step_values(config, s) for s in (0, 100, 1000))
    assert peak.lr == pytest.approx(4e-3 * math.sqrt(256 / 1024))
    assert (first.lr, last.lr) == (0.0, pytest.approx(1e-6))
    assert (first.weight_decay, last.weight_decay) == (0.04, pytest.approx(0.4))
    assert (first.ema, last.ema) == (0.992, 1.0)
    assert first.teacher_temp == 0.04
    assert step_values(config, 150).teacher_temp == pytest.approx(0.055)
    assert step_values(config, 300).teacher_temp == last.teacher_temp == 0.07
    assert [step_values(config, s).last_layer_frozen for s in (9, 10)] == [True, False]
    assert patch_teacher_temp(config, 150) == step_values(config, 150).teacher_temp
    ibot = replace(config, loss=replace(config.loss, teacher_temp=0.04, teacher_patch_temp=0.07))
    assert [step_values(ibot, s).teacher_temp for s in (0, 150, 300)] == [0.04] * 3
    temps = [patch_teacher_temp(ibot, s) for s in (0, 150, 300, 999)]
    assert temps == pytest.approx([0.04, 0.055, 0.07, 0.07])


@pytest.mark.parametrize(("start", "end"), [(4e-3, 1e-6), (0.04, 0.4), (0.992, 1.0)])
def test_cosine_is_torchs_at_every_step(start, end):
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=start)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60, eta_min=end)
    for step in range(61):
        assert cosine(step, start, end, 60) == pytest.approx(optimizer.param_groups[0]["lr"], 1e-6)
        optimizer.step()
        scheduler.step()


def test_warmup_then_cosine_is_torchs_at_every_step():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    rises = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-9, total_iters=10)
    falls = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=1e-3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [rises, falls], [10])
    for step in range(50):
        got = warmup_cosine(step, 0.3, 1e-3, warmup=10, total=50)
        assert got == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-9)
        optimizer.step()
        scheduler.step()
