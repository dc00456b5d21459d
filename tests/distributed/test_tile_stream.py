from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from cytoray.distributed.cluster import Shared, share_cpus
from cytoray.distributed.dealer import start_dealer
from cytoray.distributed.tile_stream import Ahead, TileBatch, TileStream, replace_invalid
from cytoray.perturb import CROP_POLICIES
from cytoray.streaming import ChunkOrder, StreamPosition
from cytoray.streaming.tiles import TileReaderConfig

POLICY = replace(CROP_POLICIES["dinov2"], num_global=2, num_local=1)
BATCH = 12


def batch_of(errors: list[str]) -> TileBatch:
    n = len(errors)
    pixels = np.arange(n * 12, dtype=np.uint8).reshape(n, 2, 2, 3)
    pixels.flags.writeable = False
    columns = {
        "tile_id": np.array([f"t{i}" for i in range(n)]),
        "error": np.array(errors),
        "pixels": pixels,
        "num_nuclei": np.arange(n),
    }
    return TileBatch(columns=columns, after=StreamPosition(), tiles=n)


def test_unreadable_tiles_are_replaced_and_named() -> None:
    batch = batch_of(["", "torn", "", "lost", "gone"])
    before = batch.columns["pixels"].copy()
    replace_invalid(batch)
    assert batch.invalid == [("t1", "torn"), ("t3", "lost"), ("t4", "gone")]
    assert batch.columns["num_nuclei"].tolist() == [0, 0, 2, 2, 0]
    assert np.array_equal(batch.columns["pixels"], before[[0, 0, 2, 2, 0]])
    assert batch.columns["tile_id"].tolist() == ["t0", "t1", "t2", "t3", "t4"]


def test_a_readable_batch_is_left_alone() -> None:
    batch = batch_of(["", ""])
    pixels = batch.columns["pixels"]
    replace_invalid(batch)
    assert batch.invalid == []
    assert batch.columns["pixels"] is pixels


def test_a_batch_without_one_readable_tile_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"no tile of a batch could be read; the first: torn"):
        replace_invalid(batch_of(["torn", "lost"]))


def test_a_batch_without_one_readable_tile_gets_a_tile_of_an_earlier_one() -> None:
    earlier = batch_of(["torn", "", ""])
    spare = replace_invalid(earlier)
    batch = batch_of(["torn", "lost"])
    assert replace_invalid(batch, spare) is spare
    assert batch.invalid == [("t0", "torn"), ("t1", "lost")]
    assert batch.columns["tile_id"].tolist() == ["t0", "t1"]
    for i in range(2):
        assert np.array_equal(batch.columns["pixels"][i], earlier.columns["pixels"][1])
    assert batch.columns["num_nuclei"].tolist() == [1, 1]


def taken(busy_s: float, ready_after_s: float) -> tuple[float, float]:
    """Take a batch made ready late, on a device that is busy for a while: (waited, in all)."""
    ahead, waits = Ahead(2), []
    began = time.perf_counter()
    threading.Timer(ready_after_s, ahead.put, ["batch"]).start()
    item, wait_s = ahead.take(
        lambda: time.perf_counter() - began < busy_s, lambda: waits.append(time.perf_counter())
    )
    assert item == "batch"
    assert len(waits) == (busy_s < ready_after_s)
    return wait_s, time.perf_counter() - began


def test_waiting_counts_from_when_the_device_has_nothing_to_do() -> None:
    wait_s, seconds = taken(busy_s=0.3, ready_after_s=0.6)
    assert 0.2 < wait_s < seconds - 0.25
    wait_s, seconds = taken(busy_s=0.0, ready_after_s=0.3)
    assert wait_s > 0.25
    wait_s, seconds = taken(busy_s=30.0, ready_after_s=0.3)  # ends when the batch is there
    assert wait_s < 0.05
    assert seconds < 5


def test_no_more_is_fetched_ahead_than_asked_and_closing_ends_it() -> None:
    ahead = Ahead(2)
    done = []

    def fill() -> None:
        for i in range(4):
            ahead.put(i)
            done.append(i)

    filling = threading.Thread(target=fill, daemon=True)
    filling.start()
    time.sleep(0.1)
    assert done == [0, 1]
    assert ahead.take(lambda: False, lambda: None)[0] == 0
    ahead.close()
    filling.join(timeout=5)
    assert done == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def open_streams(ray_cluster, read_plan, nuclei_dir):
    """open_streams(start, world_size, nuclei_dir=...): one stream a rank, ended by `with`."""
    import ray

    @contextmanager
    def opened(
        start: StreamPosition, world_size: int, nuclei_dir: str = nuclei_dir
    ) -> Iterator[list[TileStream]]:
        source = {
            "plan": Shared(read_plan),
            "order": ChunkOrder(num_chunks=read_plan.num_chunks, seed=2, shuffle_chunks=4),
            "config": TileReaderConfig(seed=2, policy=POLICY, nuclei_dir=nuclei_dir),
            "share": share_cpus(4, 1, cpus_per_worker=1, max_readers=2),
            "reserved_cpus": 1.0,
            "reserved_gpus": 0.0,
        }
        dealing = {
            "start": start,
            "end_epoch": 2,
            "batch_size": BATCH,
            "world_size": world_size,
            "packet_rows": 3,
        }
        name = start_dealer(source, dealing)
        streams = [TileStream(name, rank) for rank in range(world_size)]
        try:
            yield streams
        finally:
            for stream in streams:
                stream.close()
            ray.kill(ray.get_actor(name, namespace="cytoray"))

    return opened


@pytest.fixture(scope="module")
def step_batches(open_streams):
    """step_batches(start, world_size, steps=None) -> for each step, one batch a rank."""

    def run(
        start: StreamPosition, world_size: int, steps: int | None = None
    ) -> list[tuple[TileBatch, ...]]:
        with open_streams(start, world_size) as streams:
            return list(islice(zip(*streams, strict=True), steps))

    return run


@pytest.fixture(scope="module")
def alone(step_batches) -> list[tuple[TileBatch, ...]]:
    """The first seven steps of a single worker."""
    return step_batches(StreamPosition(), 1, steps=7)


def tiles_in_order(steps: list[tuple[TileBatch, ...]]) -> list[str]:
    """Tile ids step by step, rank by rank."""
    return [name for step in steps for batch in step for name in batch.columns["tile_id"].tolist()]


@pytest.mark.ray
def test_every_tile_of_an_epoch_is_used_once_over_a_stop_and_another_number_of_workers(
    step_batches, alone, plan_tile_ids
) -> None:
    """One worker for seven steps, then three from where it stopped: no loss, no repeat."""
    total = len(plan_tile_ids)
    at = alone[-1][0].after
    assert at.offset > 0  # in the middle of a window
    rest = step_batches(at, 3)
    assert {len(b.columns["tile_id"]) for step in rest[:-1] for b in step} == {BATCH // 3}
    used = tiles_in_order(alone) + tiles_in_order(rest)
    epochs = used[:total], used[total:]
    assert sorted(epochs[0]) == plan_tile_ids
    assert epochs[0][:50] != epochs[1][:50]
    assert max(Counter(epochs[1]).values()) == 1
    dropped = 2 * total - len(used)  # the last batch is cut to what three ranks share equally
    assert 0 <= dropped < 6


@pytest.mark.ray
def test_two_ranks_go_on_with_the_batches_one_would_have_had(step_batches, alone) -> None:
    """The same tiles, pixels and views, in halves."""
    rest = step_batches(alone[2][0].after, 2, steps=3)
    for halves, (whole,) in zip(rest, alone[3:6], strict=True):
        assert {half.after for half in halves} == {whole.after}
        for name in ("tile_id", "pixels", "views"):
            both = np.concatenate([half.columns[name] for half in halves])
            assert np.array_equal(both, whole.columns[name]), name


@pytest.mark.ray
def test_a_failure_of_the_stream_reaches_the_worker(open_streams) -> None:
    with (
        open_streams(StreamPosition(), 1, nuclei_dir="/nowhere") as [stream],
        pytest.raises(Exception, match="cannot read the nuclei table /nowhere"),
    ):
        next(iter(stream))
