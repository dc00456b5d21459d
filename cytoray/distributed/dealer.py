"""From slides to training workers: a Ray Data stream, dealt in a fixed order.

`streaming_split` hands blocks to whichever worker asks first, so neither the batches nor the place
to resume from can be told in advance. Here one actor runs the same Ray Data execution with its
order preserved and deals row ranges by the plan (`cytoray.streaming.deal`). It handles references
only; pixels go straight from the node that made them to the worker that trains on them.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import ray

from cytoray.distributed.stage_meter import Reporter
from cytoray.distributed.tile_source import tile_blocks
from cytoray.streaming import ChunkOrder, Step, deal
from cytoray.streaming.dealing import Slice
from cytoray.streaming.plan import ReadPlan

_STEPS_AHEAD = 4
_OWNED: dict[str, Any] = {}


@ray.remote(num_cpus=0)
class Dealer:
    """Runs the stream in a thread and answers each rank's request for its share of a step."""

    def __init__(self, source: dict[str, Any], dealing: dict[str, Any]) -> None:
        plan: ReadPlan = source["plan"].get()
        order: ChunkOrder = source["order"]
        first = order.first_position(dealing["start"])
        stop = dealing["end_epoch"] * order.num_chunks

        @lru_cache(maxsize=order.shuffle_chunks)
        def rows(position: int) -> int:
            return plan.tiles_in_chunk(int(order.chunks(np.array([position]))[1][0]))

        def blocks() -> Iterator[tuple[Any, int]]:
            for ref, positions in tile_blocks(**source, start=first, stop=stop):
                begin = 0
                for position in positions:
                    yield (ref, begin), rows(position)
                    begin += rows(position)

        self._reporter = Reporter(source.get("meter", ""), "dealer")
        self._world = dealing["world_size"]
        self._steps: dict[int, Step] = {}
        self._taken: dict[int, int] = {}
        self._lowest = 0
        self._end: int | None = None
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._deal = lambda: deal(blocks(), rows, order, **dealing)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        number = 0
        try:
            for step in self._deal():
                with self._changed:
                    self._changed.wait_for(lambda n=number: n < self._lowest + _STEPS_AHEAD)
                    self._steps[number] = step
                    self._note_changed()
                number += 1
        except BaseException as error:
            self._error = error
        with self._changed:
            self._end = number
            self._changed.notify_all()

    def share_of(self, step: int, rank: int) -> dict[str, Any] | None:
        """The slices of `rank` in global batch `step` (counted from this dealer's start).

        Returns:
            `slices`: (block reference, first row, row after the last) each; `after`:
            StreamPosition; `tiles`: of the whole batch. None when the stream has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: step in self._steps or self._end is not None)
            if step not in self._steps:
                if self._error is not None:
                    raise self._error
                return None
            dealt = self._steps[step]
            out = {
                "slices": [_rows_of_block(part) for part in dealt.shares[rank]],
                "after": dealt.after,
                "tiles": dealt.tiles,
            }
            self._taken[step] = self._taken.get(step, 0) + 1
            if self._taken[step] == self._world:
                del self._steps[step], self._taken[step]
                self._lowest = step + 1
                self._note_changed()
            return out

    def _note_changed(self) -> None:
        self._reporter.gauge("batches ready", len(self._steps))
        self._changed.notify_all()


def _rows_of_block(part: Slice) -> tuple[Any, int, int]:
    """Rows of a chunk as rows of the block that holds it."""
    reference, begin = part.block
    return reference, begin + part.start, begin + part.stop


def start_dealer(source: dict[str, Any], dealing: dict[str, Any]) -> str:
    """Start a dealer owned by this process and return the name other ranks find it by.

    Args:
        source: arguments of `tile_blocks`, without start and stop.
        dealing: keyword arguments of `cytoray.streaming.deal`.
    """
    name = f"dealer-{uuid.uuid4().hex[:12]}"
    handle = Dealer.options(  # type: ignore[attr-defined]
        name=name, namespace="cytoray", max_concurrency=dealing["world_size"] + 2
    ).remote(source, dealing)
    _OWNED[name] = handle
    return name
