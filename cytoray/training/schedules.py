"""Schedules as pure functions of the step, counted from 0; `total` is one past the last step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cytoray.training.config import PretrainConfig

REFERENCE_BATCH = 1024


def linear(step: float, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at `steps`, constant afterwards."""
    if step >= steps:
        return end
    return start + (end - start) * step / steps


def cosine(step: float, start: float, end: float, total: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at `total`, constant afterwards."""
    if step >= total:
        return end
    return start + (end - start) * 0.5 * (1.0 - math.cos(math.pi * step / total))


def warmup_cosine(step: float, peak: float, end: float, *, warmup: int, total: int) -> float:
    """From 0 linearly to `peak` at `warmup`, then half a cosine to `end` at `total`."""
    if step < warmup:
        return peak * step / warmup
    return cosine(step - warmup, peak, end, total - warmup)


@dataclass(frozen=True)
class StepValues:
    """What the schedules give at one step."""

    lr: float
    weight_decay: float
    ema: float
    teacher_temp: float
    last_layer_frozen: bool


def step_values(config: PretrainConfig, step: int) -> StepValues:
    """All schedules of a run at `step` (DINOv2: lr = base * sqrt(batch / 1024))."""
    optim, loss, total = config.optim, config.loss, config.total_steps
    peak = optim.lr * math.sqrt(config.batch_size / REFERENCE_BATCH)
    return StepValues(
        lr=warmup_cosine(step, peak, optim.min_lr, warmup=optim.warmup_steps, total=total),
        weight_decay=cosine(step, optim.weight_decay, optim.weight_decay_end, total),
        ema=cosine(step, optim.ema, optim.ema_end, total),
        teacher_temp=_teacher_temp(config, step, loss.teacher_temp),
        last_layer_frozen=step < optim.freeze_last_layer_steps,
    )


def patch_teacher_temp(config: PretrainConfig, step: int) -> float:
    """Temperature of the teacher's targets for masked patches at `step`."""
    end = config.loss.teacher_patch_temp
    return _teacher_temp(config, step, config.loss.teacher_temp if end is None else end)


def _teacher_temp(config: PretrainConfig, step: int, end: float) -> float:
    steps = config.loss.teacher_temp_warmup_steps
    steps = config.optim.warmup_steps if steps is None else steps
    return linear(step, config.loss.teacher_temp_start, end, steps)
