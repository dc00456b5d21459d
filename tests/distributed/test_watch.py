from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from cytoray.distributed.watch import EventWatch
from cytoray.progress import Progress
from cytoray.runs import RunFolder

STEP = {
    "event": "step",
    "loss": 2.5,
    "tiles_per_s": 50.0,
}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    run = RunFolder.open(tmp_path / "run", "pretrain", {})
    run.append_event({"event": "failed", "step": 1, "error": "of an earlier start"})
    return run


def shown(folder: RunFolder, events: list[dict]) -> str:
    """What a terminal-less user reads when these events are appended during a run."""
    text = io.StringIO()
    with (
        Progress("pretrain", Console(file=text, width=200)) as progress,
        EventWatch(folder, progress, total_steps=10),
    ):
        for event in events:
            folder.append_event(event)
    return text.getvalue()


def test_progress_follows_the_event_file(folder) -> None:
    text = shown(
        folder,
        [
            {"event": "start", "step": 4, "world": 2, "skipped_checkpoints": ["step_5: torn"]},
            STEP | {"step": 5, "wait_share": 0.02},
            {"event": "collapse", "step": 5, "message": "the features are collapsing"},
            {"event": "collapse_ended", "step": 9, "message": "the features are spread again"},
            {"event": "failed", "step": -1, "error": "OSError: disk full"},
        ],
    )
    assert (
        "training starts at step 4 with 2 worker(s); checkpoint passed over: step_5: torn" in text
    )
    assert "5/10 steps (50 %), loss 2.500, 50.0 tiles/s, waits 2%" in text
    assert "step 5: the features are collapsing" in text
    assert "step 9: the features are spread again" in text
    assert "failed: OSError: disk full" in text
    assert "of an earlier start" not in text


def test_a_line_still_being_written_is_shown_once_it_is_whole(folder) -> None:
    text = io.StringIO()
    line = json.dumps(STEP | {"step": 7, "wait_share": 0.0}).encode()
    with (
        Progress("pretrain", Console(file=text, width=200)) as progress,
        EventWatch(folder, progress, total_steps=10) as watch,
        folder.events_path.open("ab", buffering=0) as stream,
    ):
        stream.write(b'{"torn": 1\n' + line[:30])
        watch.read()
        stream.write(line[30:] + b"\n")
    assert text.getvalue().count("7/10 steps") == 1


def test_a_value_that_is_not_finite_does_not_end_the_display(folder) -> None:
    """JSON has no NaN: a loss that is none is null in the file."""
    text = shown(folder, [STEP | {"step": 5, "wait_share": 0.0, "loss": float("nan")}])
    assert "5/10 steps" in text
    assert "loss nan" in text
