"""One rank's batches: fetched ahead in a thread, assembled from slices of shared blocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from cytoray.distributed.stage_meter import TRAIN, TRAINERS, Reporter
from cytoray.distributed.tile_source import unpack_chunk
from cytoray.streaming import StreamPosition

_POLL_S = 0.002
# Batches in a row without one readable tile: after so many it is not a slide, it is the storage.
_MOST_BLIND = 16


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


class Ahead:
    """What was fetched ahead: filled by one thread, emptied by another, never more than `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: list[Any] = []
        self._changed = threading.Condition()
        self.closed = False

    def put(self, item: Any) -> None:
        """Add an item as soon as there is room."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._most or self.closed)
            self._items.append(item)
            self._changed.notify_all()

    def take(
        self, device_busy: Callable[[], bool], on_wait: Callable[[], None]
    ) -> tuple[Any, float]:
        """Remove the oldest item.

        Args:
            device_busy: whether the device still works on what it was given; as long as it does,
                nobody waits.
            on_wait: called when waiting begins.

        Returns:
            The item, and the seconds in which nobody had anything to do.
        """
        with self._changed:
            while not self._items and device_busy():
                self._changed.wait(_POLL_S)
            begin = time.perf_counter()
            if not self._items:
                on_wait()
                self._changed.wait_for(lambda: self._items)
            item = self._items.pop(0)
            self._changed.notify_all()
        return item, time.perf_counter() - begin

    def close(self) -> None:
        """Let whoever waits for room go on."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class RecentBlocks:
    """Blocks of the last two batches, unpacked: most of them hold tiles of the next one as well."""

    def __init__(self) -> None:
        self._last: dict[Any, dict[str, np.ndarray]] = {}
        self._before: dict[Any, dict[str, np.ndarray]] = {}

    def get(self, references: Iterable[Any]) -> dict[Any, dict[str, np.ndarray]]:
        """Columns by block reference; fetched where they are not at hand."""
        known = self._before | self._last
        wanted = dict.fromkeys(references)
        missing = [reference for reference in wanted if reference not in known]
        known |= zip(missing, map(unpack_chunk, ray.get(missing)), strict=True)
        self._before, self._last = self._last, {reference: known[reference] for reference in wanted}
        return self._last


class TileStream:
    """Iterates over one rank's batches; a thread fetches ahead so that training does not wait.

    Args:
        dealer_name: of the dealer.
        rank: whose batches.
        prefetch: batches fetched ahead.
        reporter: told when this rank works and when it waits.
        device_busy: whether the device still works on what it was given.
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
        self._blocks = RecentBlocks()
        self._ahead = Ahead(prefetch)
        self._thread = threading.Thread(target=self._fetch, daemon=True)
        self._thread.start()

    def _fetch(self) -> None:
        step, blind, spare = 0, 0, None
        try:
            while not self._ahead.closed:
                got: Any = ray.get(self._dealer.share_of.remote(step, self._rank))
                if got is None:
                    self._ahead.put(None)
                    return
                batch = self._assemble(got)
                spare = replace_invalid(batch, spare if blind < _MOST_BLIND else None)
                blind = blind + 1 if len(batch.invalid) == len(batch.columns["error"]) else 0
                self._ahead.put(batch)
                step += 1
        except BaseException as error:
            self._ahead.put(error)

    def _assemble(self, got: dict[str, Any]) -> TileBatch:
        slices = got["slices"]
        blocks = self._blocks.get(reference for reference, _, _ in slices)
        columns = {
            name: np.concatenate([blocks[ref][name][start:stop] for ref, start, stop in slices])
            for name in blocks[slices[0][0]]
        }
        return TileBatch(columns=columns, after=got["after"], tiles=got["tiles"])

    def __iter__(self) -> Iterator[TileBatch]:
        while True:
            item, wait_s = self._ahead.take(self._device_busy, lambda: self._reporter.switch(""))
            self._reporter.switch(TRAIN)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            item.wait_s = wait_s
            yield item

    def close(self) -> None:
        """Stop fetching."""
        self._ahead.close()


def replace_invalid(
    batch: TileBatch, spare: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Put a readable tile in the place of each unreadable one, and note which.

    A tile that cannot be decoded while training (it could when the slide was indexed, or its slide
    was not read whole then) is quarantined; every rank still needs batches of equal size.

    Args:
        batch: changed in place.
        spare: a readable tile of an earlier batch, for one that has none (all of it may come from
            a slide that was given up).

    Returns:
        A readable tile: columns of one row.

    Raises:
        RuntimeError: not one tile of the batch could be read, and there is no spare one.
    """
    columns = batch.columns
    errors = columns["error"]
    good = np.flatnonzero(errors == "")
    if good.size:
        spare = {name: values[good[:1]] for name, values in columns.items()}
    bad = np.flatnonzero(errors != "")
    if spare is None:
        raise RuntimeError(f"no tile of a batch could be read; the first: {errors[bad[0]]}")
    if not bad.size:
        return spare
    batch.invalid = [(str(columns["tile_id"][i]), str(errors[i])) for i in bad]
    for name, values in columns.items():
        if name not in ("tile_id", "error"):
            stand_ins = values[good] if good.size else spare[name]
            values = values.copy() if not values.flags.writeable else values
            values[bad] = stand_ins[np.arange(len(bad)) % len(stand_ins)]
            columns[name] = values
    return spare
