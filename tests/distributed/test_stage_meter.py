from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from cytoray.distributed.stage_meter import (
    PRETRAIN_STAGES,
    READERS,
    TRAIN,
    TRAINERS,
    Reporter,
    StageWatch,
    find_meter,
    memory_note,
    stage_meter,
)
from cytoray.progress import Progress


def test_time_goes_to_the_stage_a_worker_is_in() -> None:
    reporter = Reporter("", TRAINERS)
    reporter.switch(TRAIN)
    time.sleep(0.05)
    reporter.switch("")
    time.sleep(0.05)
    reporter.switch(TRAIN)
    reporter.add(TRAIN, done=8)
    report = reporter._take()
    assert 0.05 <= report["busy_s"][TRAIN] < report["alive_s"] - 0.045
    assert report["done"] == {TRAIN: 8}
    time.sleep(0.02)
    again = reporter._take()
    assert again["busy_s"][TRAIN] == pytest.approx(again["alive_s"], abs=0.002)
    assert again["done"] == {}


def test_memory_is_said_in_words() -> None:
    have = {"object_store_memory": 2e9}
    text = memory_note(have, {"object_store_memory": 1.5e9})
    assert text.startswith("object store 0.50 of 2.00 GB, driver ")
    assert int(text.split()[-2].replace(",", "")) > 20
    assert "0.00 of 2.00" in memory_note(have, {})


def test_a_watch_without_ray_or_meter_shows_nothing() -> None:
    text = io.StringIO()
    with Progress("job", Console(file=text)) as progress:
        StageWatch("meter-of-nobody", PRETRAIN_STAGES, progress).look()
    assert "reader" not in text.getvalue()


@pytest.mark.ray
def test_reports_reach_the_display(ray_cluster) -> None:
    text = io.StringIO()
    with Progress("job", Console(file=text, width=200), 0.0) as progress, stage_meter() as name:
        watch = StageWatch(name, PRETRAIN_STAGES, progress)
        reader, trainer = Reporter(name, READERS), Reporter(name, TRAINERS)
        reader.gauge("batches ready", 3)
        watch.look()
        for _ in range(2):
            for stage in ("read", "detect", "perturb"):
                reader.add(stage, seconds=0.1 + 0.6 * (stage == "detect"), done=64)
            trainer.switch(TRAIN)
            trainer.add(TRAIN, done=16)
            trainer.switch("")
            time.sleep(1.1)
            watch.look()
        reader.close()
        trainer.close()
        watch.look()
    lines = [line for line in text.getvalue().splitlines() if line.startswith("1 reader")]
    assert "batches ready 3" in lines[-1]
    assert "96 tiles queued" in lines[-1]
    assert "bottleneck: detect" in text.getvalue()
    assert "use the nuclei table" in text.getvalue()
    assert find_meter(name) is None
