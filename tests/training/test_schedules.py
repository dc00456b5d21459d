import math

import pytest

from cytoray.training import CropConfig, LossConfig, OptimConfig, PretrainConfig
from cytoray.training.schedules import cosine, linear, step_values, warmup_cosine


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
