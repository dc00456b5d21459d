"""Dealing tiles to training steps: the same global batches whatever the number of workers.

Chunks arrive in reading order as blocks of rows (one row a tile). The rows of `shuffle_chunks`
chunks form a window; the window is cut into packets of a few rows, the packets are permuted with a
seed, and the tiles are dealt off the front: global batch after global batch, each cut into equal
shares for the ranks. Only references and row ranges are handled here, never pixels, and the whole
sequence follows from (seed, plan): that is what makes resume exact and the number of workers free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cytoray.streaming.order import ChunkOrder, StreamPosition


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of a block."""

    block: Any
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Step:
    """One global batch: a list of slices for each rank, and the position after it."""

    shares: list[list[Slice]]
    after: StreamPosition
    tiles: int


def shuffle_window(
    blocks: list[tuple[Any, int]], *, packet_rows: int, seed: int, epoch: int, window: int
) -> list[Slice]:
    """Cut the blocks of a window into packets and permute the packets.

    Args:
        blocks: (block, number of rows) in reading order.
        packet_rows: rows that stay together (neighbouring rows of one chunk).
        seed: the run's seed.
        epoch: epoch of the window.
        window: number of the window in its epoch.

    Returns:
        The packets in the order they are used; every row once.
    """
    packets = [
        Slice(block, start, min(start + packet_rows, rows))
        for block, rows in blocks
        for start in range(0, rows, packet_rows)
    ]
    digest = hashlib.blake2b(f"{seed}:{epoch}:{window}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    return [packets[i] for i in rng.permutation(len(packets))]


def take(queue: list[Slice], rows: int) -> list[Slice]:
    """Remove `rows` rows from the front of `queue` (changed in place) and return them."""
    out: list[Slice] = []
    used = 0
    while rows:
        head = queue[used]
        if head.rows <= rows:
            out.append(head)
            rows -= head.rows
            used += 1
        else:
            out.append(Slice(head.block, head.start, head.start + rows))
            queue[used] = Slice(head.block, head.start + rows, head.stop)
            rows = 0
    del queue[:used]
    return out


class _Window:
    """The rows of one window still to be used."""

    def __init__(self, packets: list[Slice], epoch: int, number: int) -> None:
        self.queue = packets
        self.left = sum(p.rows for p in packets)
        self.used = 0
        self.epoch = epoch
        self.number = number

    def take(self, rows: int) -> list[Slice]:
        rows = min(rows, self.left)
        self.left -= rows
        self.used += rows
        return take(self.queue, rows)


def deal(
    blocks: Iterator[tuple[Any, int]],
    rows_expected: Callable[[int], int],
    order: ChunkOrder,
    *,
    start: StreamPosition,
    end_epoch: int,
    batch_size: int,
    world_size: int,
    packet_rows: int = 8,
) -> Iterator[Step]:
    """Turn blocks in reading order into global batches.

    Args:
        blocks: (block, rows) in reading order from the start of the window `start` stands in; the
            rows of a chunk may come as several blocks, but no block holds rows of two chunks.
        rows_expected: rows of the chunk at a position (counted over all epochs).
        order: the reading order.
        start: where to begin (tiles before it are read again where they share a window, not dealt).
        end_epoch: stop after this many epochs.
        batch_size: tiles in a global batch, a multiple of `world_size`.
        world_size: ranks.
        packet_rows: rows of one chunk that stay together.

    Yields:
        `Step`s; the last one of the run may be smaller: as many tiles as the ranks can share
        equally, at least two each.

    Raises:
        RuntimeError: the reader delivered another number of rows than the plan says.
    """
    pending: list[Slice] = []
    pending_rows = 0
    after = start
    for window in _windows(blocks, rows_expected, order, start, end_epoch, packet_rows):
        while window.left:
            got = window.take(batch_size - pending_rows)
            pending += got
            pending_rows += sum(s.rows for s in got)
            after = StreamPosition(epoch=window.epoch, window=window.number, offset=window.used)
            if pending_rows == batch_size:
                yield _share(pending, batch_size, world_size, after)
                pending, pending_rows = [], 0
    rest = pending_rows // world_size * world_size
    if rest >= 2 * world_size:
        yield _share(pending, rest, world_size, after)


def _share(pending: list[Slice], rows: int, world_size: int, after: StreamPosition) -> Step:
    queue = list(pending)
    shares = [take(queue, rows // world_size) for _ in range(world_size)]
    return Step(shares=shares, after=after, tiles=rows)


def _windows(
    blocks: Iterator[tuple[Any, int]],
    rows_expected: Callable[[int], int],
    order: ChunkOrder,
    start: StreamPosition,
    end_epoch: int,
    packet_rows: int,
) -> Iterator[_Window]:
    """Collect blocks into windows; the first one skips the tiles that were used before."""
    position = order.first_position(start)
    epoch, number, skip = start.epoch, start.window, start.offset
    while epoch < end_epoch:
        if number >= order.windows_per_epoch:
            epoch, number = epoch + 1, 0
            continue
        rows_of_blocks: list[tuple[Any, int]] = []
        for _ in range(order.window_size(number)):
            wanted = rows_expected(position)
            while wanted > 0:
                block, rows = next(blocks, (None, 0))
                if rows == 0 or rows > wanted:
                    raise RuntimeError(
                        f"the reader delivered {rows} rows at position {position}, where the plan "
                        f"says {wanted} are left; the index and the slides do not agree"
                    )
                rows_of_blocks.append((block, rows))
                wanted -= rows
            position += 1
        packets = shuffle_window(
            rows_of_blocks, packet_rows=packet_rows, seed=order.seed, epoch=epoch, window=number
        )
        window = _Window(packets, epoch, number)
        window.take(skip)
        skip = 0
        yield window
        number += 1
