import io

import pytest
from rich.console import Console

from cytoray.progress import Progress, duration, summary_table


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def run_plain(steps, interval_s=10.0):
    """Two stages updated once a second for `steps` seconds; returns the printed lines."""
    clock, stream = Clock(), io.StringIO()
    console = Console(file=stream, width=60)
    with Progress("embed slides", console, interval_s, clock) as progress:
        for step in range(steps + 1):
            clock.now_s = float(step)
            progress.update("read", step * 4, 4 * steps, "tiles")
            progress.update("encode", step * 2, detail="batch 64")
    return stream.getvalue().splitlines()


def test_lines_are_few_and_say_rate_and_time_left():
    lines = run_plain(25)
    assert lines[0] == "embed slides"
    assert lines[-1] == "embed slides: done in 25 s"
    read = [line for line in lines if line.startswith("read")]
    assert read == [
        "read: 0/100 tiles (0 %)",
        "read: 40/100 tiles (40 %), 4 tiles/s, 15 s left",
        "read: 80/100 tiles (80 %), 4 tiles/s, 5 s left",
        "read: 100/100 tiles (100 %), 4 tiles/s, done in 25 s",
    ]
    encode = [line for line in lines if line.startswith("encode")]
    assert encode[0] == "encode: 0, batch 64"
    assert encode[-1] == "encode: 50, 2/s"
    assert len(encode) == 4


def test_what_has_not_changed_is_not_said_again():
    clock, text = Clock(), io.StringIO()
    with Progress("tune", Console(file=text, width=200), 10.0, clock) as progress:
        for done, best in [(1, "a"), (1, "a"), (2, "a"), (2, "a"), (3, "b")]:
            clock.now_s += 20
            progress.update("trials", done, 4, "trials", detail=f"best so far {best}")
    lines = [line for line in text.getvalue().splitlines() if line.startswith("trials:")]
    assert [line.split(" ")[1] for line in lines] == ["1/4", "2/4", "3/4"]
    assert [line.rpartition("best so far ")[2] for line in lines if "best" in line] == ["a", "b"]


def test_no_escape_codes_and_no_markup_outside_a_terminal():
    stream = io.StringIO()
    with Progress("job", Console(file=stream)) as progress:
        progress.note("slide [red]7[/red] was left out " + "x" * 200)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "slide [red]7[/red] was left out " + "x" * 200 + "\n" in text


def test_bottleneck_is_said_once_and_marked():
    clock, stream = Clock(), io.StringIO()
    with Progress("job", Console(file=stream), 10, clock) as progress:
        for step in range(3):
            clock.now_s = step * 10.0
            progress.update("train", step, 10, "steps")
            progress.bottleneck("train", f"CPU idle {step} %")
    lines = stream.getvalue().splitlines()
    assert lines.count("bottleneck: train (CPU idle 0 %)") == 1
    assert "train: 2/10 steps (20 %), 0.1 steps/s, 1 min 20 s left, bottleneck" in lines


def test_failure_is_said_and_raised():
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress("job", Console(file=stream)):
        raise KeyError
    assert "job: stopped in" in stream.getvalue()


def test_rate_follows_the_last_half_minute():
    clock, stream = Clock(), io.StringIO()
    with Progress("job", Console(file=stream), 0, clock) as progress:
        done = 0
        for second in range(120):
            clock.now_s = float(second)
            done += 100 if second < 60 else 1
            progress.update("x", done, 10_000)
    assert ", 1/s" in stream.getvalue().splitlines()[-2]


def test_terminal_draws_a_table_in_place():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with Progress("index", console) as progress:
        progress.update("detect", 3, 12, "slides")
        progress.bottleneck("detect")
        progress.note("qc page [b]follows[/b]")
    text = stream.getvalue()
    assert "3/12 slides" in text
    assert "bottleneck" in text
    assert "qc page [b]follows[/b]" in text
    assert "\x1b[" in text


def test_durations():
    assert [duration(s) for s in (0.2, 59, 185, 8040, 273600)] == [
        "0 s",
        "59 s",
        "3 min 05 s",
        "2 h 14 min",
        "3 d 04 h",
    ]


def test_summary_table_shows_intervals_shortly():
    stream = io.StringIO()
    rows = {"auc_ci": [0.7665000000000002, 1.0], "none": [], "names": ["a", 1.0]}
    summary_table("quickstart", rows, Console(file=stream))
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["auc_ci", "0.7665,", "1"] in lines
    assert ["none", "[]"] in lines
    assert ["names", "['a',", "1.0]"] in lines


def test_summary_table_keeps_long_paths_whole():
    stream = io.StringIO()
    path = "/data/" + "a" * 120
    summary_table("quickstart", {"auc": 0.91234, "report": path, "[x]": 1}, Console(file=stream))
    text = stream.getvalue()
    assert "quickstart" in text
    assert path in text
    assert "0.9123" in text
    assert "[x]" in text
