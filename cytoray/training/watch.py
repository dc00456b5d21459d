"""Watching a run: a loss that is not finite, features that collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import SupportsFloat


class TrainingDiverged(RuntimeError):  # noqa: N818
    """The loss is no longer finite.

    Attributes:
        step: where it was seen.
    """

    def __init__(self, step: int, values: Mapping[str, float]) -> None:
        listed = ", ".join(f"{name} = {value}" for name, value in values.items())
        super().__init__(
            f"training diverged at step {step}: {listed}; the weights are those of the last good "
            "step. Lower optim.lr, lengthen optim.warmup_steps, or use precision fp32"
        )
        self.step = step
        self.values = dict(values)

    def __reduce__(self):
        return (TrainingDiverged, (self.step, self.values))


def check_finite(metrics: Mapping[str, SupportsFloat], step: int) -> None:
    """Raise if a loss or a gradient norm is not finite. Waits for the device: not every step.

    Raises:
        TrainingDiverged: with the step and the values.
    """
    watched = {k: float(v) for k, v in metrics.items() if k.startswith(("loss", "grad_norm"))}
    bad = {k: v for k, v in watched.items() if not math.isfinite(v)}
    if bad:
        raise TrainingDiverged(step, bad)


@dataclass(frozen=True, kw_only=True)
class CollapseLimits:
    """Beyond which the features count as collapsed.

    Attributes:
        feature_std: lowest spread of the unit-length class tokens (1 is evenly on the sphere).
        effective_rank: lowest participation ratio of their covariance.
        entropy_share: how near a target entropy may come to either end, as a share of log K.
    """

    feature_std: float = 0.02
    effective_rank: float = 1.2
    entropy_share: float = 0.01


def collapse_message(
    metrics: Mapping[str, SupportsFloat], limits: CollapseLimits | None = None
) -> str:
    """Say in a sentence how the features have collapsed; an empty string if they have not.

    Args:
        metrics: of one step (`PretrainEngine.step`); what is not there is not judged.
        limits: None: the defaults.
    """
    limits = limits or CollapseLimits()
    values = {name: float(value) for name, value in metrics.items()}
    found = []
    if values.get("feature_std", math.inf) < limits.feature_std:
        found.append(f"all tiles have nearly the same feature (std {values['feature_std']:.4f})")
    if values.get("effective_rank", math.inf) < limits.effective_rank:
        found.append(f"the features lie on a line (rank {values['effective_rank']:.2f})")
    bound = values.get("entropy_bound", 0.0)
    if bound > 0:
        margin = limits.entropy_share * bound
        if values.get("teacher_entropy", 0.0) > bound - margin:
            found.append("the teacher gives every tile a uniform target")
        if values.get("prototype_entropy", bound) < margin:
            found.append("the teacher gives every tile the same prototype")
    if not found:
        return ""
    return (
        f"the features are collapsing: {'; '.join(found)}. Crops may be too alike (widen the "
        "scales or the jitter), the batch too small, or the learning rate too high"
    )


@dataclass
class CollapseWatch:
    """`collapse_message` that speaks only when it lasts, and not before `start_step`.

    Attributes:
        start_step: random weights look collapsed; judge from this step on (end of the warm-up).
        patience: judgements in a row that must agree.
    """

    start_step: int = 0
    patience: int = 3
    limits: CollapseLimits = field(default_factory=CollapseLimits)
    in_a_row: int = 0

    def update(self, metrics: Mapping[str, SupportsFloat], step: int) -> str:
        """The message when collapse has lasted `patience` judgements, else an empty string."""
        message = collapse_message(metrics, self.limits) if step >= self.start_step else ""
        self.in_a_row = self.in_a_row + 1 if message else 0
        return message if self.in_a_row >= self.patience else ""
