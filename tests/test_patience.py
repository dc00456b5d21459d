from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cytoray.errors import InputError, SlideError, reason_code
from cytoray.patience import Patience, ReadTries

READ = """
import ctypes, os, signal, sys
from cytoray.patience import Patience, ReadTries
folder, token, way = sys.argv[1:]
tries = ReadTries(folder=folder, patience=Patience(timeout_s=0.5, run_token=token))
with tries.reading(3, 7):
    if way == "hang":
        ctypes.PyDLL(None).sleep(60)  # a native call that keeps the interpreter's lock
    os.kill(os.getpid(), signal.SIGKILL)
"""


def die_reading(folder: Path, token: str, way: str) -> int:
    """Read chunk 7 of slide 3 in a process that does not come back."""
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", READ, str(folder), token, way],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        timeout=60,
    ).returncode


@pytest.mark.parametrize(
    ("way", "reason", "code"),
    [("kill", "reader_crashed", -signal.SIGKILL), ("hang", "timed_out", 1)],
)
def test_a_slide_is_given_up_after_its_tries_by_every_reader(way, reason, code, tmp_path) -> None:
    tries = ReadTries(folder=str(tmp_path), patience=Patience(run_token="one"))
    for _ in range(2):
        assert die_reading(tmp_path, "one", way) == code
        with tries.reading(3, 8), tries.reading(4, 7):  # nothing is said of other places yet
            pass
    for chunk in (7, 8):  # now it is, of the whole slide
        with pytest.raises(SlideError, match="2 times") as error, tries.reading(3, chunk):
            raise AssertionError("a slide that was given up is not read")
        assert error.value.code == reason
    with tries.reading(4, 7):
        pass
    with tries.renewed("another").reading(3, 7):  # another stream tries for itself
        pass


def test_an_answer_is_no_death(tmp_path) -> None:
    """A reader that raises has lived; nothing of it is left."""
    tries = ReadTries(folder=str(tmp_path), patience=Patience(max_tries=1))
    for _ in range(3):
        with pytest.raises(SlideError, match="torn"), tries.reading(0, 0):
            raise SlideError("decode_error", "torn")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_limits_that_make_no_sense_are_all_named() -> None:
    with pytest.raises(InputError) as error:
        Patience(timeout_s=-1, max_tries=0)
    assert len(error.value.problems) == 2


def test_the_reason_survives_being_text() -> None:
    error = SlideError("timed_out", "a step took [longer]")
    assert reason_code(str(error)) == reason_code(f"no bag: {error}") == "timed_out"
    assert reason_code("JPEG tile: premature end [of data]") == "decode_error"
    assert reason_code("") == reason_code("[x]") == "decode_error"
