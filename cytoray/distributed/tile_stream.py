"""One rank's batches: fetched ahead in a thread, assembled from slices of shared blocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from cytoray.distributed.stage_meter import TRAIN, TRAINERS, Reporter
from cytoray.distributed.tile_source import unpack_chunk
from cytoray.streaming import StreamPosition

_POLL_S = 0.002


@dataclass
class TileBatch:
    """One rank's share of a global batch.

    Attributes:
        columns: numpy arrays by name, one row a tile (`pixels` uint8 (b, S, S, 3), ...).
        after: position after the global batch.
        tiles: tiles of the global batch.
        wait_s: seconds in which neither the training loop nor its device had anything to do.
    """

    columns: dict[str, np.ndarray]
    after: StreamPosition
    tiles: int
    wait_s: float = 0.0
    invalid: list[tuple[str, str]] = field(default_factory=list)


class TileStream:
    """Iterates over one rank's batches; a thread fetches ahead so that training does not wait.

    Args:
        dealer_name: of the dealer.
        rank: whose batches.
        prefetch: batches fetched ahead.
        reporter: told when this rank works and when it waits.
        device_busy: whether the device still works on what it was given; as long as it does,
            nobody waits.
    """

    def __init__(
        self,
        dealer_name: str,
        rank: int,
        *,
        prefetch: int = 2,
        reporter: Reporter | None = None,
        device_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._reporter = reporter or Reporter("", TRAINERS)
        self._device_busy = device_busy
        self._dealer = ray.get_actor(dealer_name, namespace="cytoray")
        self._rank = rank
        self._prefetch = prefetch
        self._ready: list[Any] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._fetch, daemon=True)
        self._thread.start()

    def _fetch(self) -> None:
        step = 0
        try:
            while not self._closed:
                got: Any = ray.get(self._dealer.share_of.remote(step, self._rank))
                item: Any = None if got is None else self._assemble(got)
                with self._changed:
                    self._changed.wait_for(
                        lambda: len(self._ready) < self._prefetch or self._closed
                    )
                    self._ready.append(item)
                    self._changed.notify_all()
                if item is None:
                    return
                step += 1
        except BaseException as error:
            with self._changed:
                self._ready.append(error)
                self._changed.notify_all()

    @staticmethod
    def _assemble(got: dict[str, Any]) -> TileBatch:
        blocks = ray.get([ref for ref, _, _ in got["slices"]])
        parts = [
            unpack_chunk(block, start, stop)
            for block, (_, start, stop) in zip(blocks, got["slices"], strict=True)
        ]
        columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        batch = TileBatch(columns=columns, after=got["after"], tiles=got["tiles"])
        replace_invalid(batch)
        return batch

    def __iter__(self) -> Iterator[TileBatch]:
        while True:
            with self._changed:
                while not self._ready and self._device_busy():
                    self._changed.wait(_POLL_S)
                begin = time.perf_counter()
                self._reporter.switch("")
                self._changed.wait_for(lambda: self._ready)
                self._reporter.switch(TRAIN)
                item = self._ready.pop(0)
                self._changed.notify_all()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            item.wait_s = time.perf_counter() - begin
            yield item

    def close(self) -> None:
        """Stop fetching."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def replace_invalid(batch: TileBatch) -> None:
    """Put a readable tile of the batch in the place of each unreadable one, and note which.

    A tile that cannot be decoded while training (it could when the slide was indexed, or its slide
    was not read whole then) is quarantined; every rank still needs batches of equal size.

    Raises:
        RuntimeError: not one tile of the batch could be read.
    """
    columns = batch.columns
    errors = columns["error"]
    bad = np.flatnonzero(errors != "")
    if not bad.size:
        return
    good = np.flatnonzero(errors == "")
    if not good.size:
        raise RuntimeError(f"no tile of a batch could be read; the first: {errors[bad[0]]}")
    batch.invalid = [(str(columns["tile_id"][i]), str(errors[i])) for i in bad]
    stand_in = good[np.arange(len(bad)) % len(good)]
    for name, values in columns.items():
        if name not in ("tile_id", "error"):
            values = values.copy() if not values.flags.writeable else values
            values[bad] = values[stand_in]
            columns[name] = values
