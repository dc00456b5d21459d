"""An end to slides that hang or crash their reader: a watch, and tries written down beforehand.

A native library that crashes or hangs takes its process along: nothing in that process can report
it. So each try leaves a mark before it starts, and the next one, in a new process, sees how the
last one ended.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from cytoray.errors import SlideError, raise_problems
from cytoray.io import atomic_write_text

PARTIAL = "partial"  # in a run folder: what stands there while a slide is worked on
# Reason codes of slides that are given up whole: part of one would look like all of it.
GIVEN_UP = ("timed_out", "reader_crashed")
_TRY = b"try\n"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long and how often a slide may be tried.

    Attributes:
        timeout_s: seconds that opening a slide, or one of its chunks, may take; 0: any time.
        max_tries: a slide whose process died this often at the same chunk is given up.
        run_token: names the run; tries of another run do not count (a run that was stopped has
            killed its readers itself).

    Raises:
        InputError: out of range.
    """

    timeout_s: float = 600.0
    max_tries: int = 2
    run_token: str = ""

    def __post_init__(self) -> None:
        problems = []
        if not self.timeout_s >= 0:
            problems.append(f"--timeout-s must be 0 or more, not {self.timeout_s:g}")
        if self.max_tries < 1:
            problems.append(f"--max-tries must be 1 or more, not {self.max_tries}")
        raise_problems("slides cannot be tried like that:", problems)

    def given_up(self, tries: int, *, hung: bool) -> SlideError:
        """What is said of a slide whose tries are used up: `timed_out` or `reader_crashed`."""
        if hung:
            return SlideError(
                "timed_out",
                f"a step took longer than {self.timeout_s:g} s, {tries} times; if the "
                "storage is that slow, allow more with --timeout-s",
            )
        return SlideError("reader_crashed", f"the process reading it died {tries} times")


@contextmanager
def ended_after(timeout_s: float, trace: BinaryIO) -> Iterator[None]:
    """End the whole process when what is inside takes longer; 0: it may take any time.

    The watch is a thread of the interpreter's own that needs no lock, so it also ends a native call
    that never returns; the stack is written to `trace`.
    """
    if not timeout_s:
        yield
        return
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=trace)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@dataclass(frozen=True, kw_only=True)
class ReadTries:
    """Tries at the chunks of slides, for any number of readers of one stream.

    Attributes:
        folder: where marks are left, seen by all readers; made when it is needed.
        patience: limits.
    """

    folder: str
    patience: Patience

    def renewed(self, run_token: str) -> ReadTries:
        """The same for another stream: what ended the readers of an earlier one does not count."""
        return replace(self, patience=replace(self.patience, run_token=run_token))

    @contextmanager
    def reading(self, slide: int, chunk: int) -> Iterator[None]:
        """A try at one chunk; the process ends in here when it takes too long.

        Raises:
            SlideError: `timed_out` or `reader_crashed`; the slide was given up, now or before.
        """
        place = Path(self.folder) / (self.patience.run_token or "run")
        verdict = place / f"{slide}.given_up"
        if verdict.exists():
            code, _, message = verdict.read_text(encoding="utf-8").partition("\n")
            raise SlideError(code, message)
        place.mkdir(parents=True, exist_ok=True)
        mark = place / f"{slide}.{chunk}"
        with open(mark, "a+b", buffering=0) as trace:
            tries, hung = _earlier(trace)
            if tries >= self.patience.max_tries:
                error = self.patience.given_up(tries, hung=hung)
                atomic_write_text(verdict, f"{error.code}\n{error.message}")
                raise error
            trace.write(_TRY)
            try:
                with ended_after(self.patience.timeout_s, trace):
                    yield
            finally:  # an exception too is an answer; a process that dies leaves the mark
                mark.unlink(missing_ok=True)


def _earlier(trace: BinaryIO) -> tuple[int, bool]:
    """Tries written down in a mark, and whether the watch ended one of them."""
    trace.seek(0, os.SEEK_SET)
    text = trace.read()
    tries = text.count(_TRY)
    return tries, len(text) > tries * len(_TRY)
