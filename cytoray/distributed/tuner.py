"""Trials under Ray Tune: long-lived actors that take trial after trial, stopped early at rungs.

A new process for each trial would spend longer on imports than many a trial takes, so actors are
reused: `Trainable.reset_config` begins the next trial in a process that has everything loaded.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.execution.class_cache import DEFAULT_ENV_VARS
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from cytoray.distributed.trials import SearchSettings, TrialSpec, run_trial
from cytoray.errors import InputError, SlideError

# A flag for PyTorch Lightning. Ray gives an actor one of its waiting processes only where the actor
# asks for no environment of its own; else it starts another, which imports everything again.
DEFAULT_ENV_VARS.pop("PL_DISABLE_FORK", None)

METRIC, EPOCH, FAILURE = "val_auc", "epoch", "failure"
_RETRIES = 1


class Judge(Protocol):
    """Says at a rung whether a trial goes on; see `AshaByGroup`."""

    def rungs(self, epochs: int) -> list[int]: ...
    def add(self, key: str) -> None: ...
    def goes_on(self, key: str, values: Mapping[str, Any]) -> bool: ...


class PacedTrial:
    """A trial that waits at its rungs to be told to go on or to end; either way it finishes.

    Args:
        run: called with an `on_epoch`.
        rungs: epochs to wait at; none: the trial runs in one go, in the caller's thread.
    """

    def __init__(self, run: Callable[[Any], dict[str, Any]], rungs: list[int]) -> None:
        self._run, self._rungs = run, rungs
        self._records: queue.Queue[dict[str, Any]] = queue.Queue()
        self._orders: queue.Queue[bool] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._best = -1.0
        self._error: BaseException | None = None
        self.finished = False

    def advance(self) -> dict[str, Any]:
        """Up to the next rung or the end."""
        if not self._rungs:
            self.finished = True
            return _last_values(self._run, None)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        else:
            self._orders.put(False)
        return self._next()

    def stop(self) -> dict[str, Any]:
        """Let a waiting trial end here; its last values."""
        self._orders.put(True)
        return self._next()

    @property
    def waits(self) -> bool:
        """Whether it stands at a rung."""
        return self._thread is not None and not self.finished

    def _next(self) -> dict[str, Any]:
        values = self._records.get()
        self.finished = values["done"]
        if self._error is not None:
            raise self._error
        return values

    def _work(self) -> None:
        try:
            self._records.put(_last_values(self._run, self._at_epoch))
        except BaseException as error:
            self._error = error
            self._records.put({"done": True})

    def _at_epoch(self, record: dict[str, float]) -> bool:
        if record["val_auc"] == record["val_auc"]:
            self._best = max(self._best, record["val_auc"])
        if int(record["epoch"]) not in self._rungs:
            return False
        self._records.put({METRIC: self._best, EPOCH: int(record["epoch"]), "done": False})
        return self._orders.get()


def _last_values(run: Callable[[Any], dict[str, Any]], on_epoch: Any) -> dict[str, Any]:
    """The end of a trial; what the user must mend is told, not raised."""
    try:
        run(on_epoch)
    except (InputError, SlideError) as error:
        return {FAILURE: str(error), "done": True}
    return {"done": True}


class MILTrainable(tune.Trainable):
    """One MIL trial to Ray Tune; a step goes to the next rung, or to the trial's end."""

    def setup(self, config: dict[str, Any], settings: SearchSettings | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begin the first trial of this process."""
        assert settings is not None, "given by with_parameters"
        self._settings = settings
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        run = functools.partial(run_trial, config["trial"]["spec"], self._settings)
        self._paced = PacedTrial(run, list(config["trial"]["rungs"]))

    def step(self) -> dict[str, Any]:
        """Values at the next rung, or `done`."""
        return {METRIC: -1.0, EPOCH: 0} | self._paced.advance()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; one that was stopped at a rung leaves its result first."""
        self.cleanup()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """Let a trial that was stopped at a rung leave its result."""
        if self._paced.waits:
            self._paced.stop()


class ByGroup(FIFOScheduler):
    """Asks the judge at every rung."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self._judge = judge

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial begins."""
        self._judge.add(trial.config["trial"]["spec"].key)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Go on or stop."""
        on = self._judge.goes_on(trial.config["trial"]["spec"].key, result)
        return TrialScheduler.CONTINUE if on else TrialScheduler.STOP


def tune_trials(
    specs: Sequence[TrialSpec],
    settings: SearchSettings,
    folder: Path,
    *,
    max_concurrent: int = 0,
    judge: Judge | None = None,
) -> dict[str, str]:
    """Run trials to their end, or to where the judge stops them.

    Args:
        specs: trials to run, in order.
        settings: shared by the trials.
        folder: where Ray Tune keeps its own files.
        max_concurrent: trials at a time; 0: as many as the resources allow.
        judge: early stopping; None: every trial runs to its end.

    Returns:
        the message of each trial that failed, by key.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # trials keep their own logs
    space = [
        {"spec": spec, "rungs": judge.rungs(spec.config.epochs) if judge else []} for spec in specs
    ]
    trainable: Any = tune.with_parameters(MILTrainable, settings=settings)
    resources = {"cpu": settings.cpus_per_trial, "gpu": settings.gpus_per_trial}
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"trial": tune.grid_search(space)},
        tune_config=tune.TuneConfig(
            scheduler=ByGroup(judge) if judge else None,
            # A limit is needed for reuse: without it Tune starts an actor for every waiting trial.
            max_concurrent_trials=pool_size(settings, max_concurrent),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"search-{int(time.time())}",
            storage_path=str(folder.resolve()),
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
            # A finished trial is its own checkpoint: its folder.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    found = tuner.fit()
    failed = {}
    for i in range(len(found)):
        result = found[i]
        key = result.config["trial"]["spec"].key  # type: ignore[index]
        if result.error is not None:
            lines = [line for line in str(result.error).strip().splitlines() if line.strip()]
            failed[key] = lines[-1].strip()
        elif (result.metrics or {}).get(FAILURE):
            failed[key] = result.metrics[FAILURE]  # type: ignore[index]
    return failed


def pool_size(settings: SearchSettings, max_concurrent: int) -> int:
    """Trials at a time: what fits the cluster, at most `max_concurrent` (0: no limit)."""
    have = ray.cluster_resources()
    fits = [have.get("CPU", 0.0) / settings.cpus_per_trial]
    if settings.gpus_per_trial:
        per_gpu = int(1 / settings.gpus_per_trial + 1e-9)
        whole = have.get("GPU", 0.0)
        fits.append(whole * per_gpu if per_gpu else whole / settings.gpus_per_trial)
    size = max(1, int(min(fits) + 1e-9))
    return min(size, max_concurrent) if max_concurrent else size
