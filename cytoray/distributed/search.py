"""A search of MIL trials under Ray Tune; finished trials are kept and never run again."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from cytoray.distributed.trials import (
    HeldOut,
    SearchSettings,
    TrialSpec,
    predict_slides,
    read_result,
    run_trial,
)
from cytoray.distributed.tuner import EPOCH, METRIC, tune_trials
from cytoray.mil.selection import best_result
from cytoray.progress import Progress

TRIAL_MODULE = "cytoray.distributed.tuner"  # what a process needs that runs trials


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Asynchronous successive halving (ASHA): at each rung the worse trials of a fold end.

    Attributes:
        grace_epochs: epochs before the first rung.
        reduction: one in so many goes on; rungs are so many times apart.
    """

    grace_epochs: int = 5
    reduction: float = 3.0

    def rungs(self, epochs: int) -> list[int]:
        """Epochs, below the last, at which a trial is compared."""
        made, at = [], float(self.grace_epochs)
        while at < epochs:
            made.append(math.ceil(at))
            at *= self.reduction
        return made


class AshaByGroup:
    """One Ray Tune `AsyncHyperBandScheduler` a fold and length: only trials that compare are
    compared.

    Args:
        specs: by key.
        halving: the rungs.
        finished: results of trials that are done already; their course counts at the rungs.
    """

    def __init__(
        self, specs: Mapping[str, TrialSpec], halving: Halving, finished: Sequence[Mapping] = ()
    ) -> None:
        self._specs, self._halving = dict(specs), halving
        self._groups: dict[tuple[str, int], AsyncHyperBandScheduler] = {}
        self._trials = {key: _Known(key) for key in specs}
        for result in finished:
            self._replay(result)

    def rungs(self, epochs: int) -> list[int]:
        """Epochs at which a trial is compared."""
        return self._halving.rungs(epochs)

    def add(self, key: str) -> None:
        """A trial begins (again)."""
        self._group(key).on_trial_add(None, self._trial(key))  # type: ignore[arg-type]

    def goes_on(self, key: str, values: Mapping[str, Any]) -> bool:
        """Whether a trial that got so far goes on."""
        decision = self._group(key).on_trial_result(
            None,  # type: ignore[arg-type]
            self._trial(key),
            dict(values),
        )
        return decision != TrialScheduler.STOP

    def _trial(self, key: str) -> Any:
        return self._trials[key]

    def _group(self, key: str) -> AsyncHyperBandScheduler:
        spec = self._specs[key]
        name = (spec.fold, spec.config.epochs)
        if name not in self._groups:
            self._groups[name] = AsyncHyperBandScheduler(
                time_attr=EPOCH,
                metric=METRIC,
                mode="max",
                max_t=spec.config.epochs,
                grace_period=min(self._halving.grace_epochs, spec.config.epochs),
                reduction_factor=self._halving.reduction,
            )
        return self._groups[name]

    def _replay(self, result: Mapping[str, Any]) -> None:
        """Enter a finished trial's best so far at every rung it passed."""
        key, best = result["key"], -1.0
        self.add(key)
        rungs = self.rungs(self._specs[key].config.epochs)
        for record in result["history"]:
            best = max(best, record["val_auc"] if record["val_auc"] is not None else -1.0)
            if record["epoch"] in rungs:
                self.goes_on(key, {EPOCH: record["epoch"], METRIC: best})


@dataclass(frozen=True)
class _Known:
    """What the scheduler needs of a trial."""

    trial_id: str


class ShowTrials:
    """Counts finished trials on the progress display, by the results they leave.

    Args:
        progress: the display.
        specs: all trials.
        on_result: called once with each result, as it appears.
    """

    def __init__(
        self,
        progress: Progress,
        specs: Sequence[TrialSpec],
        on_result: Callable[[dict[str, Any]], None] = lambda result: None,
    ) -> None:
        self._progress, self._specs, self._on_result = progress, specs, on_result
        self._done: dict[str, dict[str, Any]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> ShowTrials:
        self._show()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show()

    def _follow(self) -> None:
        while not self._stop.wait(1.0):
            self._show()

    def _show(self) -> None:
        for spec in self._specs:
            if spec.key not in self._done and (result := read_result(spec.folder)) is not None:
                self._done[spec.key] = result
                self._on_result(result)
        detail = ""
        if self._done:
            best = best_result(list(self._done.values()))
            detail = f"best so far {best['key']}, val AUC {best['val'].get('auc') or 0:.3f}"
        self._progress.update("trials", len(self._done), len(self._specs), "trials", detail=detail)


def run_search(
    specs: Sequence[TrialSpec],
    settings: SearchSettings,
    out: Path,
    *,
    progress: Progress,
    max_concurrent: int = 0,
    halving: Halving | None = None,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Run every trial that has no result yet.

    Args:
        specs: the whole search.
        settings: shared by the trials.
        out: the run folder.
        progress: shown while it runs.
        max_concurrent: trials at a time; 0: as many as the resources allow.
        halving: end bad trials early; None: all run to their end.
        on_result: called once with each result, as it appears, from another thread.

    Returns:
        results of all finished trials in the specs' order, and the message of each failed one.
    """
    found = [read_result(spec.folder) for spec in specs]
    finished = [result for result in found if result is not None]
    todo = [spec for spec, result in zip(specs, found, strict=True) if result is None]
    failed: dict[str, str] = {}
    with ShowTrials(progress, specs, on_result):
        if todo:
            by_key = {spec.key: spec for spec in specs}
            judge = AshaByGroup(by_key, halving, finished) if halving else None
            failed = tune_trials(
                todo, settings, out / "ray", max_concurrent=max_concurrent, judge=judge
            )
    results = [result for spec in specs if (result := read_result(spec.folder)) is not None]
    return results, failed


def predict_part(
    head_folder: str | Path, encoder: int, settings: SearchSettings, indices: np.ndarray, *,
    adapted: bool
) -> HeldOut:  # fmt: skip
    """Run a saved head on slides: here, or where it needs the encoder or a GPU, on the cluster.

    Args:
        head_folder: written by a trial.
        encoder: the feature set it was trained on.
        settings: shared by the trials.
        indices: slides of the cohort.
        adapted: whether the head has LoRA weights.
    """
    if not adapted and not settings.gpus_per_trial:
        return predict_slides(str(head_folder), encoder, settings, indices)
    task = ray.remote(predict_slides).options(
        num_cpus=settings.cpus_per_trial, num_gpus=settings.gpus_per_trial or None
    )
    return ray.get(task.remote(str(head_folder), encoder, settings, indices))


def run_one(spec: TrialSpec, settings: SearchSettings) -> dict[str, Any]:
    """One trial, unless it is finished: here, or where it needs the encoder or a GPU, as a task."""
    done = read_result(spec.folder)
    if done is not None:
        return done
    if spec.config.lora_rank == 0 and not settings.gpus_per_trial:
        return run_trial(spec, settings)
    task = ray.remote(run_trial).options(
        num_cpus=settings.cpus_per_trial, num_gpus=settings.gpus_per_trial or None
    )
    return ray.get(task.remote(spec, settings))
