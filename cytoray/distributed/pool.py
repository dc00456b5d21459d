"""Long-lived actors that take trial after trial: what a process needs is loaded once.

A new process for each trial would spend longer on imports than many a trial takes.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from cytoray.distributed.trials import SearchSettings, TrialSpec, run_trial
from cytoray.errors import InputError, SlideError

METRIC, EPOCH = "val_auc", "epoch"
ATTEMPTS = 2


class Judge(Protocol):
    """Says at a rung whether a trial goes on; see `AshaByGroup`."""

    def rungs(self, epochs: int) -> list[int]: ...
    def add(self, key: str) -> None: ...
    def goes_on(self, key: str, values: Mapping[str, Any]) -> bool: ...


class TrialWorker:
    """An actor that runs one trial at a time, up to a rung or to its end."""

    def __init__(self, settings: SearchSettings) -> None:
        self._settings = settings
        self._paced: PacedTrial | None = None

    def ready(self) -> None:
        """Answers once the process is up."""

    def start(self, spec: TrialSpec, rungs: list[int]) -> dict[str, Any]:
        """Begin a trial; values at its first rung, or `done`."""
        self._paced = PacedTrial(functools.partial(run_trial, spec, self._settings), rungs)
        return self._paced.advance()

    def go_on(self) -> dict[str, Any]:
        """The trial up to its next rung, or `done`."""
        assert self._paced is not None, "started before"
        return self._paced.advance()

    def end(self) -> dict[str, Any]:
        """End the trial at the rung it waits at; it leaves its result."""
        assert self._paced is not None, "started before"
        return self._paced.stop()


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

    def advance(self) -> dict[str, Any]:
        """Up to the next rung or the end."""
        if not self._rungs:
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

    def _next(self) -> dict[str, Any]:
        values = self._records.get()
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
        return {"failure": str(error), "done": True}
    return {"done": True}


class Pool:
    """Deals trials to workers until all are done.

    Args:
        specs: trials to run, in order.
        settings: shared by the trials.
        size: workers at most.
        judge: early stopping; None: every trial runs to its end.
    """

    def __init__(
        self,
        specs: Sequence[TrialSpec],
        settings: SearchSettings,
        size: int,
        judge: Judge | None = None,
    ) -> None:
        self._waiting = deque(specs)
        self._settings, self._judge = settings, judge
        self._tries: dict[str, int] = {}
        self._failed: dict[str, str] = {}
        self._tasks: dict[Any, tuple[Any, TrialSpec | None]] = {}
        self._shared = ray.put(settings)
        for _ in range(min(size, len(specs))):
            self._hire()

    def run(self) -> dict[str, str]:
        """Run all; the message of each trial that failed."""
        try:
            while self._tasks:
                [done], _ = ray.wait(list(self._tasks), num_returns=1)
                worker, spec = self._tasks.pop(done)
                try:
                    self._answered(worker, spec, ray.get(done))
                except RayActorError as error:
                    self._lost(spec, error)
                except RayTaskError as error:
                    lines = str(error.cause or error).strip().splitlines() or ["it failed"]
                    self._end(worker, spec, f"{type(error.cause).__name__}: {lines[-1]}")
        finally:
            for worker, _ in self._tasks.values():
                ray.kill(worker)
        return self._failed

    def _hire(self) -> None:
        gpus = self._settings.gpus_per_trial
        worker = (
            ray.remote(TrialWorker)
            .options(num_cpus=self._settings.cpus_per_trial, num_gpus=gpus or None)
            .remote(self._shared)
        )
        self._tasks[worker.ready.remote()] = (worker, None)

    def _answered(self, worker: Any, spec: TrialSpec | None, values: dict | None) -> None:
        if spec is None or values is None:
            self._deal(worker)
        elif values["done"]:
            self._end(worker, spec, values.get("failure", ""))
        else:
            on = self._judge is None or self._judge.goes_on(spec.key, values)
            task = worker.go_on.remote() if on else worker.end.remote()
            self._tasks[task] = (worker, spec)

    def _deal(self, worker: Any) -> None:
        """The next trial, or the end of the worker."""
        if not self._waiting:
            ray.kill(worker)
            return
        spec = self._waiting.popleft()
        self._tries[spec.key] = self._tries.get(spec.key, 0) + 1
        rungs = []
        if self._judge is not None:
            self._judge.add(spec.key)
            rungs = self._judge.rungs(spec.config.epochs)
        self._tasks[worker.start.remote(spec, rungs)] = (worker, spec)

    def _end(self, worker: Any, spec: TrialSpec | None, failure: str) -> None:
        if spec is not None and failure:
            self._failed[spec.key] = failure
        self._deal(worker)

    def _lost(self, spec: TrialSpec | None, error: RayActorError) -> None:
        """A worker died: its trial is tried once more, by a new one."""
        if spec is None:
            lines = str(error).strip().splitlines()
            raise InputError(f"a worker of the search could not start: {lines[0]}")
        if self._tries[spec.key] < ATTEMPTS:
            self._waiting.appendleft(spec)
        else:
            self._failed[spec.key] = f"its process died {ATTEMPTS} times (out of memory?)"
        if self._waiting:
            self._hire()


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
