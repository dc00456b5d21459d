"""The MLflow runs of a search's trials, kept up with in the background from the trials' files.

Trials write their metrics to a file each and know nothing of MLflow. A thread of the driver makes
a run for each trial that has begun, sends what its file holds, and closes it. While the server is
away nothing waits and nothing is lost: the files stay, and the rest is sent when it is back, at
the end, or by the same job started again.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlflow.exceptions import MlflowException

from cytoray.io import atomic_write_text
from cytoray.tracking.mlflow_tracking import Tracker

logger = logging.getLogger(__name__)
T = TypeVar("T")
_SLOWEST_S = 15.0


@dataclass(frozen=True, kw_only=True)
class ChildRun:
    """A trial's run.

    Attributes:
        key: what makes it the same run when the job is started again.
        name: shown in the UI, and how `finish` is told of it.
        folder: the trial's; `metrics.jsonl` in it holds lines of `step`, `time_ms`, `metrics`, and
            `tracked.json` says what the tracking store has.
        params: the config.
        tags: more tags.
    """

    key: str
    name: str
    folder: Path
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _State:
    """How far the tracking store is."""

    child: ChildRun
    run_id: str = ""
    sent_bytes: int = 0
    end: tuple[str, dict[str, float], dict[str, str]] | None = None
    closed: bool = False


class ChildRuns:
    """Keeps the children of one parent run; use it as a context around the search.

    Args:
        tracker: the store.
        parent_run_id: their parent.
        children: all that may come; a run is made once its trial has begun or ended.
        every_s: pause between looks.
    """

    def __init__(
        self,
        tracker: Tracker,
        parent_run_id: str,
        children: Sequence[ChildRun],
        every_s: float = 2.0,
    ) -> None:
        self._tracker, self._parent, self._every_s = tracker, parent_run_id, every_s
        self._states = {child.name: _State(child) for child in children}
        for state in self._states.values():
            self._take_up(state)
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="cytoray-children", daemon=True)

    def __enter__(self) -> ChildRuns:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def finish(
        self,
        name: str,
        status: str,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Have a run closed once its metrics are sent; returns at once."""
        finite = {k: float(v) for k, v in (metrics or {}).items() if v is not None and v == v}
        self._states[name].end = (status, finite, {k: str(v) for k, v in (tags or {}).items()})

    def settle(self, wait_s: float = 30.0) -> list[str]:
        """Wait until every finished run is closed, at most so long; names of those that are not."""
        end = time.monotonic() + wait_s
        while True:
            states = self._states.values()
            if self._pass() and not any(s.end is not None and not s.closed for s in states):
                return []
            if time.monotonic() > end:
                return [name for name, state in self._states.items() if self._pending(state)]
            time.sleep(min(1.0, wait_s / 10))

    def _run(self) -> None:
        pause = self._every_s
        while not self._closing.wait(pause):
            pause = self._every_s if self._pass() else min(2 * pause, _SLOWEST_S)

    def _pass(self) -> bool:
        """Send what there is; whether the store took all of it."""
        with self._lock:
            states = [state for state in self._states.values() if not state.closed]
            for state in states:
                try:
                    self._catch_up(state)
                except (MlflowException, OSError) as error:
                    self._warn(error)
                    return False
            if self._warned:
                logger.warning("MLflow is back: the metrics kept in the trials' folders were sent")
                self._warned = False
            return True

    def _catch_up(self, state: _State) -> None:
        end = state.end  # before the file is read: all that was written by then is in it
        data = self._unsent(state)
        if not state.run_id:
            if not data and end is None:
                return
            child = state.child
            state.run_id = self._tracker.start_run(
                child.name, tags=child.tags, params=child.params, parent_run_id=self._parent,
                key=child.key,
            )  # fmt: skip
        if data:
            self._tracker.log_lines(state.run_id, data)
            state.sent_bytes += len(data)
        if end is not None:
            status, metrics, tags = end
            if metrics:
                self._tracker.log_metrics(state.run_id, metrics)
            if tags:
                self._tracker.set_tags(state.run_id, tags)
            self._tracker.end_run(state.run_id, status)
            state.closed = True
            if status == "FINISHED":
                facts = {"uri": self._tracker.uri, "run_id": state.run_id}
                atomic_write_text(state.child.folder / "tracked.json", json.dumps(facts) + "\n")

    def _take_up(self, state: _State) -> None:
        """A run that an earlier start closed in this store is left alone."""
        path = state.child.folder / "tracked.json"
        if path.exists():
            facts = json.loads(path.read_text(encoding="utf-8"))
            state.closed = facts["uri"] == self._tracker.uri

    @staticmethod
    def _unsent(state: _State) -> bytes:
        """Whole lines of the trial's metrics that the store does not have."""
        path = state.child.folder / "metrics.jsonl"
        if not path.exists():
            return b""
        with path.open("rb") as stream:
            stream.seek(state.sent_bytes)
            data = stream.read()
        return data[: data.rfind(b"\n") + 1]

    def _pending(self, state: _State) -> bool:
        return not state.closed and (state.end is not None or bool(self._unsent(state)))

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            lines = str(error).strip().splitlines() or [type(error).__name__]
            logger.warning(
                "MLflow at %s does not answer (%s); the search goes on, metrics are kept in the "
                "trials' folders",
                self._tracker.uri,
                lines[0][:200],
            )


def patiently(action: Callable[[], T], wait_s: float = 30.0, pause_s: float = 1.0) -> T | None:
    """Do something with the tracking store, again and again while it is away; None if it stays so.

    Args:
        action: may be done twice.
        wait_s: how long to try.
        pause_s: between tries.
    """
    end = time.monotonic() + wait_s
    while True:
        try:
            return action()
        except (MlflowException, OSError) as error:
            if time.monotonic() > end:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                logger.warning("MLflow does not answer (%s)", lines[0][:200])
                return None
            time.sleep(pause_s)
