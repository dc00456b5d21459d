"""Blocks here are lists of (epoch, chunk, index) rows: what is dealt can be read off directly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cytoray.streaming import ChunkOrder, StreamPosition, deal, shuffle_window

COUNTS = np.array([5, 1, 13, 8, 64, 2, 30, 7, 9, 21, 3])
EPOCHS = 2


def make_order(seed: int = 0) -> ChunkOrder:
    return ChunkOrder(num_chunks=len(COUNTS), seed=seed, shuffle_chunks=4)


def rows_expected(order: ChunkOrder):
    def count(position: int) -> int:
        return int(COUNTS[order.chunks(np.array([position]))[1][0]])

    return count


def blocks(order: ChunkOrder, start: StreamPosition, rows_per_block: int = 10):
    for position in range(order.first_position(start), order.num_chunks * EPOCHS):
        epochs, chunks = order.chunks(np.array([position]))
        rows = [(int(epochs[0]), int(chunks[0]), i) for i in range(COUNTS[chunks[0]])]
        for i in range(0, len(rows), rows_per_block):
            part = rows[i : i + rows_per_block]
            yield part, len(part)


def run(order, *, start=None, batch_size=24, world_size=1):
    start = start or StreamPosition()
    return list(
        deal(
            blocks(order, start),
            rows_expected(order),
            order,
            start=start,
            end_epoch=EPOCHS,
            batch_size=batch_size,
            world_size=world_size,
            packet_rows=4,
        )
    )


def rows_of(share):
    return list(itertools.chain.from_iterable(s.block[s.start : s.stop] for s in share))


def rows_of_step(step):
    return list(itertools.chain.from_iterable(rows_of(share) for share in step.shares))


def test_every_tile_of_every_epoch_is_dealt_once() -> None:
    order = make_order()
    dealt = [row for step in run(order) for row in rows_of_step(step)]
    everything = [(e, c, i) for e in range(EPOCHS) for c, n in enumerate(COUNTS) for i in range(n)]
    assert len(dealt) == len(set(dealt))
    assert set(dealt) <= set(everything)
    assert len(everything) - len(dealt) < 2  # only what one rank cannot make a pair of


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_global_batches_do_not_depend_on_the_number_of_workers(world_size: int) -> None:
    order = make_order()
    alone, shared = run(order), run(order, world_size=world_size)
    for one, many in zip(alone[:-1], shared, strict=False):
        assert rows_of_step(one) == rows_of_step(many)
        assert {len(rows_of(share)) for share in many.shares} == {24 // world_size}


def test_going_on_from_any_step_deals_the_same_rest_with_any_number_of_workers() -> None:
    order = make_order(seed=7)
    whole = run(order)
    for k in range(len(whole) - 1):
        rest = run(order, start=whole[k].after, world_size=1 + k % 3)
        assert rows_of_step(rest[0]) == rows_of_step(whole[k + 1])
        before = {row for step in whole[: k + 1] for row in rows_of_step(step)}
        after = {row for step in rest for row in rows_of_step(step)}
        assert not before & after
        assert sum(COUNTS) * EPOCHS - len(before) - len(after) < 6


def test_a_batch_mixes_chunks() -> None:
    order = make_order()
    chunks = [{row[:2] for row in rows_of_step(step)} for step in run(order)]
    assert np.mean([len(c) for c in chunks]) > 2


def test_window_order_changes_with_the_epoch() -> None:
    parts = [("a", 20), ("b", 20)]
    first = shuffle_window(parts, packet_rows=4, seed=0, epoch=0, window=0)
    second = shuffle_window(parts, packet_rows=4, seed=0, epoch=1, window=0)
    assert first != second
    assert sorted((s.block, s.start) for s in first) == sorted((s.block, s.start) for s in second)


def test_a_reader_that_disagrees_with_the_plan_is_an_error() -> None:
    order = make_order()
    with pytest.raises(RuntimeError, match="do not agree"):
        list(
            deal(
                iter([("block", 1000)]),
                rows_expected(order),
                order,
                start=StreamPosition(),
                end_epoch=1,
                batch_size=8,
                world_size=1,
            )
        )
