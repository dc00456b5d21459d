from __future__ import annotations

import io

import pytest
from rich.console import Console

from cytoray.progress import Progress
from cytoray.stage_view import stage_line, stage_table
from cytoray.stages import HAND_OVER, Stage, StageLoad, StageTotals, StageWindow, find_bottleneck

STAGES = (
    Stage(name="read", group="reader", advice="faster storage"),
    Stage(name="detect", group="reader", advice="add CPU nodes"),
    Stage(name="train", group="trainer", after="detect", advice="add GPUs"),
)


def loads(read: float | None, detect: float | None, train: float | None, done: float = 10):
    shares = (read, detect, train)
    return [
        StageLoad(stage=stage, busy_share=share, done=done, workers=2, rate_per_s=5.0)
        for stage, share in zip(STAGES, shares, strict=True)
    ]


@pytest.mark.parametrize(
    ("shares", "name", "why", "advice"),
    [
        ((0.1, 0.2, 0.97), "train", "busy 97%", "add GPUs"),
        ((0.3, 0.6, 0.86), "train", "busy 86%", "add GPUs"),
        ((0.1, 0.8, 0.6), "detect", "busy 80%, train waits 40%", "add CPU nodes"),
        ((0.7, 0.2, 0.1), "read", "busy 70%, train waits 90%", "faster storage"),
        ((0.3, 0.3, 0.5), "read", "busy 30%, train waits 50%", "faster storage"),
        ((None, None, 0.2), "train", "busy 20%", "add GPUs"),
    ],
)
def test_the_bottleneck_is_the_busiest_stage_before_a_starved_one(shares, name, why, advice):
    assert find_bottleneck(loads(*shares)) == (name, why, advice)


def test_when_readers_idle_and_training_waits_it_is_what_lies_between():
    found = find_bottleneck(loads(0.1, 0.2, 0.4))
    assert found is not None
    assert found[:2] == (HAND_OVER, "readers busy 30%, train waits 60%")


def test_nothing_is_blamed_before_the_last_stage_has_begun():
    assert find_bottleneck(loads(0.9, 0.1, 0.0, done=0)) is None
    assert find_bottleneck(loads(0.9, 0.1, None)) is None


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def measured(seconds: int, totals: StageTotals, clock: Clock, window: StageWindow, **rates: float):
    """Two readers and a trainer report every second what they did in it."""
    for _ in range(seconds):
        clock.now_s += 1
        for worker in ("a", "b"):
            busy = {"read": rates["read"], "detect": rates["detect"]}
            done = {"read": rates["made"] / 2, "detect": rates["made"] / 2}
            totals.add("reader", worker, alive_s=1.0, busy_s=busy, done=done)
        totals.add(
            "trainer",
            "t",
            alive_s=1.0,
            busy_s={"train": rates["train"]},
            done={"train": rates["used"]},
            gauges={"batches ready": rates["used"]},
        )
        window.add(totals.look())
    return window.loads()


def test_loads_are_what_was_measured_in_the_last_half_minute():
    clock = Clock()
    totals, window = StageTotals(clock), StageWindow(STAGES)
    assert window.loads() == []
    measured(10, totals, clock, window, read=0.5, detect=0.5, made=40, train=0.0, used=0)
    start = measured(1, totals, clock, window, read=0.1, detect=0.6, made=8, train=0.5, used=4)
    assert start[2].busy_share == pytest.approx(0.5)  # the wait for the first batch is left out
    got = measured(60, totals, clock, window, read=0.1, detect=0.6, made=8, train=0.5, used=4)
    read, detect, train = got
    assert [load.workers for load in got] == [2, 2, 1]
    assert [load.busy_share for load in got] == pytest.approx([0.1, 0.6, 0.5])
    assert [load.rate_per_s for load in got] == pytest.approx([8, 8, 4])
    assert [load.ms_per_unit for load in got] == pytest.approx([25, 150, 125])
    assert (read.queue, detect.queue, train.queue) == (None, None, 400 + 61 * 4)
    assert totals.look()["gauges"] == {"batches ready": 4}


def test_a_new_start_forgets_and_passes_over_what_was_used_before():
    clock = Clock()
    totals, window = StageTotals(clock), StageWindow(STAGES)
    measured(20, totals, clock, window, read=0.9, detect=0.1, made=4, train=0.1, used=4)
    totals.reset({"train": 50})
    assert window.loads()
    window.add(totals.look())
    assert window.loads() == []
    *_, train = measured(10, totals, clock, window, read=0, detect=0.5, made=10, train=1, used=4)
    assert train.done == 40
    assert train.queue == 100 - 40 - 50
    assert train.busy_share == 1.0


def test_workers_that_fall_silent_are_gone():
    clock = Clock()
    totals, window = StageTotals(clock), StageWindow(STAGES)
    measured(3, totals, clock, window, read=0, detect=1, made=1, train=1, used=1)
    clock.now_s += 60
    totals.add("reader", "a", alive_s=1.0, busy_s={}, done={})
    assert totals.look()["workers"] == {"reader": 1, "trainer": 0}


def test_a_line_for_a_log_every_ten_seconds():
    clock, stream = Clock(), io.StringIO()
    with Progress("job", Console(file=stream), 10, clock) as progress:
        for _ in range(25):
            progress.loads(loads(0.1, 0.8, 0.6), "tiles", "driver 1 MB")
            clock.now_s += 1
        progress.loads([], "tiles")
    lines = stream.getvalue().splitlines()
    line = "2 readers 5 tiles/s: read 10%, detect 80% | 2 trainers 5 tiles/s: train 60%"
    assert lines.count(f"{line} | driver 1 MB") == 3
    why = "bottleneck: detect (busy 80%, train waits 40%); add CPU nodes"
    assert lines.count(why) == 1


def test_a_table_for_a_terminal():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, height=40)
    with Progress("pretrain", console) as progress:
        progress.update("train", 3, 12, "steps")
        progress.loads(loads(0.1, 0.8, 0.6), "tiles", "object store 1 of 2 GB")
    text = stream.getvalue()
    for part in ("ms a tile", "2 readers", "80%", "3/12 steps", "; add CPU nodes", "1 of 2 GB"):
        assert part in text, part


def test_what_is_unknown_is_left_blank():
    some = loads(None, 0.5, None)
    assert stage_line(some, "tiles") == "2 readers 5 tiles/s: detect 50% | 2 trainers 5 tiles/s"
    console = Console(file=io.StringIO(), width=120)
    console.print(stage_table(some, None, "tiles"))
    assert "None" not in console.file.getvalue()  # type: ignore[attr-defined]
