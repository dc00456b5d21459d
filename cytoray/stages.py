"""How busy the stages of a stream are and which of them the others wait for. Plain numbers.

Workers add up what they did (`StageTotals`); who watches takes a look now and then, and two looks
make rates and shares (`StageWindow`). Stages that run one after another in the same worker, as
read, detect and perturb do, share its time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

WINDOW_S = 30.0
# A worker that said nothing for so long has ended.
GONE_AFTER_S = 10.0
# The last stage is starved when it waits for more than this share of its time.
STARVED = 0.15
# Workers that work for less than this share of their time are not what the last stage waits for.
IDLE = 0.5


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a job.

    Attributes:
        name: what it does, a verb.
        group: the kind of worker it runs in.
        after: the stage whose finished units queue in front of it; empty: none.
        advice: what to do when the others wait for it.
    """

    name: str
    group: str
    after: str = ""
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """A stage over the last half minute.

    Attributes:
        stage: which.
        workers: how many work at it now.
        done: units finished since the start.
        rate_per_s: units per second.
        busy_share: share of its workers' time spent in it, 0..1; None: not known yet.
        ms_per_unit: its workers' milliseconds for one unit; None: nothing was finished.
        queue: finished units that wait in front of it; None: it has no queue.
    """

    stage: Stage
    workers: int = 0
    done: float = 0.0
    rate_per_s: float = 0.0
    busy_share: float | None = None
    ms_per_unit: float | None = None
    queue: float | None = None

    @property
    def name(self) -> str:
        return self.stage.name


class Bottleneck(NamedTuple):
    """The stage the others wait for, how that shows, and what to do about it."""

    name: str
    why: str
    advice: str


HAND_OVER = "hand-over"
HAND_OVER_ADVICE = "give the object store more memory, or mix fewer chunks (--shuffle-chunks)"


def find_bottleneck(loads: Sequence[StageLoad]) -> Bottleneck | None:
    """Name the stage that holds the stream up.

    When the last stage waits for more than 15 % of its time it is starved: by the busiest stage
    before it, or, where those workers stand idle too, by what lies between. Else it is itself the
    slowest, as it should be.

    Args:
        loads: stages in the order of the stream.

    Returns:
        None as long as the last stage has finished nothing.
    """
    last, before = loads[-1], [s for s in loads[:-1] if s.busy_share is not None]
    if last.busy_share is None or not last.done:
        return None
    waits = 1 - last.busy_share
    if waits <= STARVED or not before:
        return Bottleneck(last.name, f"busy {last.busy_share:.0%}", last.stage.advice)
    slowest = max(before, key=lambda load: load.busy_share or 0.0)
    pool = sum(s.busy_share or 0.0 for s in before if s.stage.group == slowest.stage.group)
    starved = f"{last.name} waits {waits:.0%}"
    if pool < IDLE:
        why = f"{slowest.stage.group}s busy {pool:.0%}, {starved}"
        return Bottleneck(HAND_OVER, why, HAND_OVER_ADVICE)
    return Bottleneck(
        slowest.name, f"busy {slowest.busy_share:.0%}, {starved}", slowest.stage.advice
    )


@dataclass
class StageTotals:
    """Sums of what all workers report; the watching side asks for `look`s at them.

    Attributes:
        clock: seconds, monotonic; replaced in tests.
    """

    clock: Callable[[], float] = time.monotonic
    _run: int = 0
    _done: dict[str, float] = field(default_factory=dict)
    _passed: dict[str, float] = field(default_factory=dict)
    _busy_s: dict[str, float] = field(default_factory=dict)
    _alive_s: dict[str, float] = field(default_factory=dict)
    _seen_s: dict[tuple[str, str], float] = field(default_factory=dict)
    _gauges: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        group: str,
        worker: str,
        *,
        alive_s: float,
        busy_s: Mapping[str, float],
        done: Mapping[str, float],
        gauges: Mapping[str, float] | None = None,
    ) -> None:
        """Take a worker's report of what happened since its last one.

        Args:
            group: the kind of worker.
            worker: which; unique.
            alive_s: seconds since its last report.
            busy_s: of them, seconds spent in each stage.
            done: units finished by each stage.
            gauges: present values, e.g. of a queue; the newest counts.
        """
        self._seen_s[group, worker] = self.clock()
        self._alive_s[group] = self._alive_s.get(group, 0.0) + alive_s
        for sums, added in ((self._busy_s, busy_s), (self._done, done)):
            for stage, value in added.items():
                sums[stage] = sums.get(stage, 0.0) + value
        self._gauges |= gauges or {}

    def reset(self, passed: Mapping[str, float] | None = None) -> None:
        """Forget everything: the stream starts anew.

        Args:
            passed: units that come to a stage and are passed over, e.g. tiles of a window that
                were used before the stream was stopped.
        """
        self._run += 1
        for sums in (self._done, self._busy_s, self._alive_s, self._seen_s, self._gauges):
            sums.clear()
        self._passed = dict(passed or {})

    def look(self) -> dict[str, Any]:
        """The sums now, as plain values."""
        now = self.clock()
        workers: dict[str, int] = {}
        for (group, _), seen_s in self._seen_s.items():
            workers[group] = workers.get(group, 0) + (now - seen_s < GONE_AFTER_S)
        return {
            "run": self._run,
            "at_s": now,
            "done": dict(self._done),
            "passed": dict(self._passed),
            "busy_s": dict(self._busy_s),
            "alive_s": dict(self._alive_s),
            "workers": workers,
            "gauges": dict(self._gauges),
        }


class StageWindow:
    """Turns looks at `StageTotals` into loads over the last half minute.

    Args:
        stages: in the order of the stream.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._looks: deque[dict[str, Any]] = deque()

    def add(self, look: dict[str, Any]) -> None:
        """Take a look.

        What came before a `reset` is forgotten, and so is the time in which the last stage waited
        for its first unit: that is how a stream starts, and says nothing about its stages.
        """
        last = self._stages[-1].name
        if self._looks and self._looks[-1]["run"] != look["run"]:
            self._looks.clear()
        if self._looks and not self._looks[-1]["done"].get(last) and look["done"].get(last):
            while len(self._looks) > 1:
                self._looks.popleft()
        self._looks.append(look)
        while len(self._looks) > 2 and look["at_s"] - self._looks[1]["at_s"] > WINDOW_S:
            self._looks.popleft()

    def loads(self) -> list[StageLoad]:
        """One a stage, in order; none before there were two looks and a worker."""
        if len(self._looks) < 2 or not self._looks[-1]["alive_s"]:
            return []
        return [self._load(stage) for stage in self._stages]

    def _load(self, stage: Stage) -> StageLoad:
        now = self._looks[-1]
        seconds = now["at_s"] - self._looks[0]["at_s"]
        done, busy_s = self._gain("done", stage.name), self._gain("busy_s", stage.name)
        alive_s = self._gain("alive_s", stage.group)
        finished = now["done"].get(stage.name, 0.0)
        gone = finished + now["passed"].get(stage.name, 0.0)
        return StageLoad(
            stage=stage,
            workers=now["workers"].get(stage.group, 0),
            done=finished,
            rate_per_s=done / seconds if seconds > 0 else 0.0,
            busy_share=min(1.0, busy_s / alive_s) if alive_s > 0 else None,
            ms_per_unit=1e3 * busy_s / done if done else None,
            queue=max(0.0, now["done"].get(stage.after, 0.0) - gone) if stage.after else None,
        )

    def _gain(self, kind: str, name: str) -> float:
        return self._looks[-1][kind].get(name, 0.0) - self._looks[0][kind].get(name, 0.0)
