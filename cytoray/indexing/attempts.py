"""Tries at one slide: what earlier tries finished, and an end to the ones that hang or crash."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.errors import SlideError
from cytoray.indexing.journal import Journal

PARTIAL = "partial"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long and how often a slide may be tried.

    Attributes:
        timeout_s: seconds that opening a slide, or one of its chunks, may take; 0: any time.
        max_tries: a slide whose process died this often at the same chunk is quarantined.
        run_token: names the run; tries of another run do not count (a run that was stopped has
            killed its readers itself).
    """

    timeout_s: float = 600.0
    max_tries: int = 2
    run_token: str = ""


class Attempt:
    """One try at indexing a slide. Chunks finished by an earlier try are not done again.

    A native library that crashes or hangs takes its process along: nothing in that process can
    report it. So every try is written down before it starts; the next one, in a new process, sees
    how the last one ended, and gives up when it is the last allowed.

    Args:
        out: the run folder.
        slide_id: the slide.
        key: what a chunk's result hangs on: settings and the file's fingerprint, plain values.
        patience: limits.

    Raises:
        SlideError: `timed_out` or `reader_crashed` when earlier tries used up the patience.
    """

    def __init__(
        self, out: str | Path, slide_id: str, key: dict[str, Any], patience: Patience
    ) -> None:
        self.patience = patience
        folder = Path(out) / PARTIAL
        self._journal = Journal(folder / f"{slide_id}.journal", key)
        self._hung = folder / f"{slide_id}.hung.txt"
        self._chunks = {r["chunk"]: (r, data) for r, data in self._journal.records if "chunk" in r}
        tries = self._tries_in_vain()
        if tries >= patience.max_tries:
            hung = self._hung.exists() and self._hung.stat().st_size > 0
            self.close(finished=True)
            if hung:
                raise SlideError(
                    "timed_out",
                    f"a step took longer than {patience.timeout_s:g} s, {tries} times; if the "
                    "storage is that slow, allow more with --timeout-s",
                )
            raise SlideError("reader_crashed", f"the process reading it died {tries} times")
        self._journal.append({"try_of": patience.run_token})

    def _tries_in_vain(self) -> int:
        """Tries of this run that ended since the last chunk was finished."""
        count = 0
        for record, _ in reversed(self._journal.records):
            if record.get("try_of") != self.patience.run_token:
                break
            count += 1
        return count

    def finished_chunk(self, chunk: int) -> tuple[dict[str, Any], np.ndarray] | None:
        """Values and nuclei float32 (N, 4) of a chunk that an earlier try finished, else None."""
        if chunk not in self._chunks:
            return None
        values, data = self._chunks[chunk]
        return values["values"], np.frombuffer(data, np.float32).reshape(-1, 4)

    def finish_chunk(self, chunk: int, values: dict[str, Any], nuclei: np.ndarray) -> None:
        """Keep a chunk's result; it will not be done again."""
        data = np.ascontiguousarray(nuclei, np.float32).tobytes()
        self._journal.append({"chunk": chunk, "values": values}, data)

    @contextmanager
    def step(self) -> Iterator[None]:
        """End the whole process when what is inside takes longer than the time allowed.

        The watch is a thread of the interpreter's own that needs no lock, so it also ends a native
        call that never returns; the stack is left in the partial folder.
        """
        if not self.patience.timeout_s:
            yield
            return
        with open(self._hung, "w") as trace:
            faulthandler.dump_traceback_later(self.patience.timeout_s, exit=True, file=trace)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()

    def close(self, *, finished: bool) -> None:
        """End the try; with `finished` the slide's result is safe and what led to it goes."""
        if not finished:
            self._journal.close()
            return
        self._journal.remove()
        self._hung.unlink(missing_ok=True)
