from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from cytoray.distributed import tile_source
from cytoray.distributed.cluster import Shared, share_cpus
from cytoray.distributed.tile_source import Positions, pack_chunk, tile_blocks, unpack_chunk
from cytoray.patience import Patience, ReadTries
from cytoray.perturb import CROP_POLICIES
from cytoray.streaming import ChunkOrder
from cytoray.streaming.tiles import TileReader, TileReaderConfig

POLICY = replace(CROP_POLICIES["dinov2"], num_global=2, num_local=1)


@pytest.fixture
def columns(rng) -> dict[str, np.ndarray]:
    return {
        "pixels": rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8),
        "views": rng.random((5, 3, 14), dtype=np.float32),
        "tile_id": np.array([f"s:{i}" for i in range(5)]),
        "error": np.array(["", "", "lost, since ünreadable", "", ""]),
        "num_nuclei": np.arange(5, dtype=np.int32),
    }


def test_a_chunk_is_one_row_and_comes_back(columns) -> None:
    table = pack_chunk(columns)
    assert table.num_rows == 1
    back = unpack_chunk(table)
    assert list(back) == list(columns)
    for name, values in columns.items():
        assert back[name].dtype.kind == values.dtype.kind
        assert np.array_equal(back[name], values)


def test_a_chunk_is_packed_and_unpacked_without_a_copy(columns) -> None:
    pixels = unpack_chunk(pack_chunk(columns))["pixels"]
    assert np.shares_memory(pixels, columns["pixels"])
    assert not pixels.flags.writeable


def test_columns_of_another_layout_in_memory(columns) -> None:
    turned = columns["pixels"].transpose(0, 2, 1, 3)
    back = unpack_chunk(pack_chunk({"pixels": turned}))
    assert np.array_equal(back["pixels"], turned)


def test_one_row_of_a_table_of_chunks(columns) -> None:
    """Blocks of several chunks are cut into rows, also across the pieces of a table."""
    tables = [pack_chunk({"views": columns["views"] + i}) for i in range(3)]
    table = pa.concat_tables(tables)
    for whole in (table, table.combine_chunks()):
        for i in range(3):
            views = unpack_chunk(whole.slice(i, 1))["views"]
            assert np.array_equal(views, columns["views"] + i)


def test_positions_are_listed_in_order_in_bounded_pieces() -> None:
    tasks = Positions(7, 250_003).get_read_tasks(1)
    assert len(tasks) == 3
    assert [task.metadata.num_rows for task in tasks] == [100_000, 100_000, 49_996]
    first = next(iter(tasks[1]()))
    assert isinstance(first, pa.Table)
    assert first.column("position").to_pylist() == [100_007]
    last = [table.column("position")[0].as_py() for table in tasks[2]()]
    assert last == list(range(200_007, 250_003))
    [task] = Positions(5, 12, together=3).get_read_tasks(1)
    assert [table.column("position").to_pylist() for table in task()] == [
        [5, 6, 7],
        [8, 9, 10],
        [11],
    ]
    tasks = Positions(0, 100_001, together=3).get_read_tasks(1)
    assert [task.metadata.num_rows for task in tasks] == [99_999, 2]  # every block is whole


def read_back(blocks) -> list[tuple[range, dict[str, np.ndarray]]]:
    """Positions and tiles of each block."""
    import ray

    return [(positions, unpack_chunk(ray.get(ref))) for ref, positions in blocks]


def joined(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


@pytest.mark.ray
@pytest.mark.parametrize(("block_bytes", "together"), [(64 << 20, 4), (1, 1)])
def test_blocks_come_in_reading_order(
    ray_cluster, read_plan, nuclei_dir, monkeypatch, block_bytes, together
) -> None:
    """Whatever reader is faster: position by position what `TileReader` gives alone."""
    monkeypatch.setattr(tile_source, "_BLOCK_BYTES", block_bytes)
    order = ChunkOrder(num_chunks=read_plan.num_chunks, seed=5, shuffle_chunks=4)
    config = TileReaderConfig(seed=5, policy=POLICY, nuclei_dir=nuclei_dir)
    start, stop = 3, read_plan.num_chunks + 5  # on into the second epoch
    blocks = tile_blocks(
        Shared(read_plan),
        order,
        config,
        share_cpus(4, 1, cpus_per_worker=1, max_readers=2),
        start=start,
        stop=stop,
        reserved_cpus=1,
        reserved_gpus=0,
    )
    reader = TileReader(read_plan, order, config)
    found = read_back(blocks)
    for positions, tiles in found:
        alone = joined([reader.read(position) for position in positions])
        for name in ("tile_id", "pixels", "views", "num_nuclei"):
            assert np.array_equal(tiles[name], alone[name]), name
    assert [p for positions, _ in found for p in positions] == list(range(start, stop))
    assert {len(positions) for positions, _ in found[:-1]} == {together}


class DeadlyReadTiles(tile_source.ReadTiles):
    """Opening one slide ends the process, as a native library would that meets a bad file."""

    def __init__(self, plan, order, config, meter="") -> None:
        super().__init__(plan, order, config, meter)
        slides = self.reader.slides
        inner = slides._opened

        def opened(slide: int):
            if slide == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(slide)

        slides._opened = opened


@pytest.mark.ray
def test_a_slide_that_kills_its_readers_is_given_up_and_the_order_holds(
    ray_cluster, read_plan, nuclei_dir, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(tile_source, "ReadTiles", DeadlyReadTiles)
    order = ChunkOrder(num_chunks=read_plan.num_chunks, seed=5, shuffle_chunks=4)
    config = TileReaderConfig(seed=5, policy=POLICY, nuclei_dir=nuclei_dir)
    tries = ReadTries(folder=str(tmp_path), patience=Patience(max_tries=1))
    blocks = tile_blocks(
        Shared(read_plan),
        order,
        replace(config, tries=tries),
        share_cpus(4, 1, cpus_per_worker=1, max_readers=2),
        start=0,
        stop=read_plan.num_chunks,
        reserved_cpus=1,
        reserved_gpus=0,
    )
    reader = TileReader(read_plan, order, config)
    died = "the process reading it died 1 times [reader_crashed]"
    count = lost = 0
    for positions, tiles in read_back(blocks):
        alone = [reader.read(position) for position in positions]
        slides = read_plan.slide_of(order.chunks(np.array(positions))[1])
        bad = np.repeat(slides == 1, [len(chunk["tile_id"]) for chunk in alone])
        assert tiles["tile_id"].tolist() == joined(alone)["tile_id"].tolist()
        assert np.array_equal(tiles["pixels"][~bad], joined(alone)["pixels"][~bad])
        assert tiles["error"].tolist() == np.where(bad, died, "").tolist()
        lost += bad.sum()
        count += len(positions)
    assert lost > 0
    assert count == read_plan.num_chunks
