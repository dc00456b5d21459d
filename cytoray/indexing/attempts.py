"""Tries at one slide: what earlier tries finished, and an end to the ones that hang or crash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.indexing.journal import Journal
from cytoray.patience import PARTIAL, Patience, ended_after


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
            raise patience.given_up(tries, hung=hung)
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

        The stack is then left in the partial folder.
        """
        with open(self._hung, "wb") as trace, ended_after(self.patience.timeout_s, trace):
            yield

    def close(self, *, finished: bool) -> None:
        """End the try; with `finished` the slide's result is safe and what led to it goes."""
        if not finished:
            self._journal.close()
            return
        self._journal.remove()
        self._hung.unlink(missing_ok=True)
