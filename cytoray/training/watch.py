"""Watching a run: a loss that is not finite, features that collapse."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


def collapse_signs(
    metrics: Mapping[str, SupportsFloat], limits: CollapseLimits | None = None
) -> dict[str, str]:
    """In which ways the features have collapsed: what is said of each, by the metric that shows it.

    Args:
        metrics: of one step (`PretrainEngine.step`); what is not there is not judged.
        limits: None: the defaults.
    """
    limits = limits or CollapseLimits()
    values = {name: float(value) for name, value in metrics.items()}
    found = {}
    if values.get("feature_std", math.inf) < limits.feature_std:
        std = values["feature_std"]
        found["feature_std"] = f"all tiles have nearly the same feature (std {std:.4f})"
    if values.get("effective_rank", math.inf) < limits.effective_rank:
        rank = values["effective_rank"]
        found["effective_rank"] = f"the features lie on a line (rank {rank:.2f})"
    bound = values.get("entropy_bound", 0.0)
    if bound > 0:
        margin = limits.entropy_share * bound
        if values.get("teacher_entropy", 0.0) > bound - margin:
            found["teacher_entropy"] = "the teacher gives every tile a uniform target"
        if values.get("prototype_entropy", bound) < margin:
            found["prototype_entropy"] = "the teacher gives every tile the same prototype"
    return found


def collapse_message(
    metrics: Mapping[str, SupportsFloat], limits: CollapseLimits | None = None
) -> str:
    """Say in a sentence how the features have collapsed; an empty string if they have not.

    Args:
        metrics: of one step (`PretrainEngine.step`); what is not there is not judged.
        limits: None: the defaults.
    """
    return _sentence(collapse_signs(metrics, limits))


def _sentence(signs: Mapping[str, str]) -> str:
    if not signs:
        return ""
    return (
        f"the features are collapsing: {'; '.join(signs.values())}. Crops may be too alike (widen "
        "the scales or the jitter), the batch too small, or the learning rate too high"
    )


class CollapseWatch:
    """Says when a collapse has begun to last, when its signs change, and when it has ended.

    Args:
        start_step: random weights look collapsed; judge from this step on (end of the warm-up).
        patience: judgements in a row without which it has not begun, changed or ended.
        limits: None: the defaults.
    """

    def __init__(
        self, start_step: int = 0, patience: int = 3, limits: CollapseLimits | None = None
    ) -> None:
        self._start_step, self._limits = start_step, limits
        self._recent: deque[dict[str, str]] = deque(maxlen=patience)
        self._said: frozenset[str] = frozenset()

    def update(self, metrics: Mapping[str, SupportsFloat], step: int) -> tuple[str, str]:
        """Judge a step: `collapse` or `collapse_ended` and a sentence; two empty texts: no news."""
        if step >= self._start_step:
            self._recent.append(collapse_signs(metrics, self._limits))
        whole = len(self._recent) == self._recent.maxlen
        if not whole or not (self._said or all(self._recent)):
            return "", ""
        signs = {name: text for judged in self._recent for name, text in judged.items()}
        if signs.keys() == self._said:
            return "", ""
        self._said = frozenset(signs)
        if signs:
            return "collapse", _sentence(signs)
        return "collapse_ended", "the features are spread again"
