"""What the workers of a job do, measured where they work and shown where the job was started.

A `StageMeter` is one small actor on the node of whoever started the job. Workers report to it every
second or so through a `Reporter`, from a thread of their own; nothing waits for it, and a job goes
on without it. A `StageWatch` looks at it and keeps the display up to date.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cytoray.stages import Stage, StageTotals, StageWindow

if TYPE_CHECKING:  # what readers import is time until their first tile
    from cytoray.progress import Progress
    from cytoray.runs import RunFolder

_NAMESPACE = "cytoray"
_REPORT_EVERY_S = 1.0
_LOOK_EVERY_S = 1.0

READ, DETECT, PERTURB, TRAIN, EMBED = "read", "detect", "perturb", "train", "embed"
READERS, TRAINERS, ENCODERS = "reader", "trainer", "encoder"
PRETRAIN_STAGES = (
    Stage(name=READ, group=READERS, advice="add CPU nodes, or put the slides on faster storage"),
    Stage(name=DETECT, group=READERS, advice="add CPU nodes, or use the nuclei table"),
    Stage(name=PERTURB, group=READERS, advice="add CPU nodes, or draw fewer crops"),
    Stage(
        name=TRAIN,
        group=TRAINERS,
        after=PERTURB,
        advice="the readers keep up; to go faster add GPUs (--workers), or take a smaller backbone",
    ),
)
EMBED_STAGES = (
    Stage(name=READ, group=READERS, advice="add CPU nodes, or put the slides on faster storage"),
    Stage(
        name=EMBED,
        group=ENCODERS,
        after=READ,
        advice="the readers keep up; to go faster add GPUs (--encoders)",
    ),
)


@ray.remote(num_cpus=0)
class StageMeter:
    """`StageTotals` that workers anywhere can reach by name."""

    def __init__(self) -> None:
        self._totals = StageTotals()

    def add(self, group: str, worker: str, report: dict[str, Any]) -> None:
        self._totals.add(group, worker, **report)

    def reset(self, passed: dict[str, float]) -> None:
        self._totals.reset(passed)

    def look(self) -> dict[str, Any]:
        return self._totals.look()


@contextmanager
def stage_meter(name: str = "") -> Iterator[str]:
    """Run a meter on this node; gives the name that workers report to, and ends it after."""
    name = name or f"meter-{uuid.uuid4().hex[:12]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = StageMeter.options(  # type: ignore[attr-defined]
        name=name, namespace=_NAMESPACE, get_if_exists=True, scheduling_strategy=here
    ).remote()
    try:
        yield name
    finally:
        ray.kill(actor)


def meter_name(folder: RunFolder) -> str:
    """What the meter of a run is called; a restarted job finds it again."""
    return f"meter-{folder.run_id}"


def find_meter(name: str) -> Any:
    """The meter's handle, or None when there is none (yet, or any more)."""
    try:
        return ray.get_actor(name, namespace=_NAMESPACE)
    except (ValueError, RayError):
        return None


class Reporter:
    """Adds up what this process does and tells the meter about it every second.

    Args:
        meter: the meter's name; empty: nothing is reported.
        group: the kind of worker.
    """

    def __init__(self, meter: str, group: str) -> None:
        self._meter, self._group = meter, group
        self._worker = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._lock = threading.Lock()
        self._busy_s: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._stage, self._since = "", time.perf_counter()
        self._told = self._since
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if meter:
            self._thread = threading.Thread(target=self._tell_on, daemon=True)
            self._thread.start()

    def add(self, stage: str, *, seconds: float = 0.0, done: float = 0.0) -> None:
        """Count seconds spent in a stage and units it finished."""
        with self._lock:
            self._busy_s[stage] = self._busy_s.get(stage, 0.0) + seconds
            self._done[stage] = self._done.get(stage, 0.0) + done

    def switch(self, stage: str) -> None:
        """The worker's time from now on goes to `stage`; empty: it waits."""
        with self._lock:
            self._book(time.perf_counter())
            self._stage = stage

    def gauge(self, name: str, value: float) -> None:
        """Set a present value."""
        with self._lock:
            self._gauges[name] = value

    def close(self) -> None:
        """Tell the last and stop."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _book(self, now: float) -> None:
        if self._stage:
            spent = now - self._since
            self._busy_s[self._stage] = self._busy_s.get(self._stage, 0.0) + spent
        self._since = now

    def _take(self) -> dict[str, Any]:
        """The report since the last one."""
        with self._lock:
            now = time.perf_counter()
            self._book(now)
            report = {
                "alive_s": now - self._told,
                "busy_s": self._busy_s,
                "done": self._done,
                "gauges": self._gauges,
            }
            self._told, self._busy_s, self._done, self._gauges = now, {}, {}, {}
        return report

    def _tell_on(self) -> None:
        actor = None
        stopped = False
        while not stopped:
            stopped = self._stop.wait(_REPORT_EVERY_S)
            actor = actor or find_meter(self._meter)
            if actor is not None:
                actor.add.remote(self._group, self._worker, self._take())


class StageWatch:
    """Looks at a meter every second and shows what it says.

    Args:
        meter: its name.
        stages: of the job, in the order of the stream.
        progress: where to show them.
        unit: what the stages count.
    """

    def __init__(
        self, meter: str, stages: Sequence[Stage], progress: Progress, *, unit: str = "tiles"
    ) -> None:
        self._name, self._progress, self._unit = meter, progress, unit
        self._window = StageWindow(stages)
        self._actor: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> StageWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            self.look()

    def look(self) -> None:
        """Show the present state; nothing when there is no meter."""
        if not ray.is_initialized():
            return
        try:
            self._actor = self._actor or find_meter(self._name)
            if self._actor is None:
                return
            found: Any = ray.get(self._actor.look.remote(), timeout=5.0)
            memory = memory_note(ray.cluster_resources(), ray.available_resources())
        except RayError:
            self._actor = None
            return
        self._window.add(found)
        ahead = [f"{name} {value:,.0f}" for name, value in sorted(found["gauges"].items())]
        self._progress.loads(self._window.loads(), self._unit, ", ".join([*ahead, memory]))


def memory_note(have: Mapping[str, float], free: Mapping[str, float]) -> str:
    """Object store in use over the cluster and memory of this process, in words.

    Args:
        have: `ray.cluster_resources()`.
        free: `ray.available_resources()`.
    """
    total = have.get("object_store_memory", 0.0)
    used = total - free.get("object_store_memory", total)
    own = psutil.Process().memory_info().rss
    return f"object store {used / 1e9:.2f} of {total / 1e9:.2f} GB, driver {own / 1e6:,.0f} MB"
