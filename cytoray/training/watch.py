"""Watching a run: a loss that is not finite, features that collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import SupportsFloat

import torch


class TrainingDiverged(RuntimeError):  # noqa: N818
    """The loss is no longer finite.

    Attributes:
        step: the first that was not.
        values: what was not finite.
        tile_ids: of that step's batch, as far as this worker knows them.
    """

    def __init__(
        self, step: int, values: Mapping[str, float], tile_ids: Sequence[str] = ()
    ) -> None:
        listed = ", ".join(f"{name} = {value}" for name, value in values.items())
        some = f"{', '.join(tile_ids[:3])} and {len(tile_ids) - 3} more" if tile_ids else ""
        some = ", ".join(tile_ids) if 0 < len(tile_ids) <= 3 else some
        super().__init__(
            f"training diverged at step {step}: {listed}; no weight was changed by it. "
            + (f"Its tiles: {some}. " if some else "")
            + "Lower optim.lr, lengthen optim.warmup_steps, or use precision fp32"
        )
        self.step = step
        self.values = dict(values)
        self.tile_ids = tuple(tile_ids)

    def __reduce__(self):
        return (TrainingDiverged, (self.step, self.values, self.tile_ids))


def check_finite(metrics: Mapping[str, SupportsFloat], step: int) -> None:
    """Raise if a loss or a gradient norm is not finite. Waits for the device: not every step.

    Raises:
        TrainingDiverged: with the step and the values.
    """
    bad = {k: float(v) for k, v in _watched(metrics).items() if not math.isfinite(float(v))}
    if bad:
        raise TrainingDiverged(step, bad)


def _watched(metrics: Mapping[str, SupportsFloat]) -> dict[str, SupportsFloat]:
    return {k: v for k, v in metrics.items() if k.startswith(("loss", "grad_norm"))}


class StepGuard:
    """Finds the step that went wrong though nobody waits for the device at every step."""

    def __init__(self) -> None:
        self._held: list[tuple[int, dict[str, SupportsFloat], Sequence[str]]] = []

    def add(self, step: int, metrics: Mapping[str, SupportsFloat], tile_ids: Sequence[str]) -> None:
        """Hold the losses and gradient norms of a step, still on the device."""
        self._held.append((step, _watched(metrics), tile_ids))

    def check(self) -> None:
        """Look at all steps since the last look; waits for the device once.

        Raises:
            TrainingDiverged: with the first step that is not finite, its values and tiles.
        """
        held, self._held = self._held, []
        fine = [
            torch.isfinite(torch.stack([torch.as_tensor(v) for v in watched.values()])).all()
            for _, watched, _ in held
            if watched
        ]
        if not fine or bool(torch.stack(fine).all()):
            return
        for step, watched, tile_ids in held:
            try:
                check_finite(watched, step)
            except TrainingDiverged as error:
                raise TrainingDiverged(step, error.values, tile_ids) from None


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
