"""The stream of chunks: positions in, one block of ready tiles a chunk out, in reading order."""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from cytoray.distributed.cluster import Share, Shared
from cytoray.distributed.stage_meter import DETECT, PERTURB, READ, READERS, Reporter
from cytoray.patience import ReadTries
from cytoray.slides import TILES_PER_CHUNK
from cytoray.streaming import ChunkOrder
from cytoray.streaming.plan import ReadPlan
from cytoray.streaming.tile_pixels import ChunkTiles
from cytoray.streaming.tiles import TileReader, TileReaderConfig

_POSITIONS_PER_LIST_TASK = 100_000
_CHUNKS_PER_TASK = 4
# Pixels of a block of several chunks, at most: every block costs the same few milliseconds in the
# processes of Ray, whatever is in it.
_BLOCK_BYTES = 64 << 20


class Positions(Datasource):
    """Positions [start, stop); a list task makes 100,000 of them as a stream.

    Args:
        start: first position.
        stop: position after the last.
        together: positions in a block, so chunks that a reader is given at once. Handing over a
            task costs milliseconds, and more where the cores are busy.
    """

    def __init__(self, start: int, stop: int, together: int = 1) -> None:
        self._range, self._together = (start, stop), together

    def estimate_inmemory_data_size(self) -> int:
        return 8 * (self._range[1] - self._range[0])

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        start, stop = self._range
        several = _POSITIONS_PER_LIST_TASK // self._together * self._together
        return [
            _positions_task(low, min(low + several, stop), self._together)
            for low in range(start, stop, several)
        ]


def _positions_task(low: int, high: int, together: int) -> ReadTask:
    def make() -> Iterator[pa.Table]:
        for first in range(low, high, together):
            positions = range(first, min(first + together, high))
            yield pa.table({"position": pa.array(positions, pa.int64())})

    metadata = BlockMetadata(
        num_rows=high - low, size_bytes=8 * (high - low), input_files=None, exec_stats=None
    )
    return ReadTask(make, metadata)


class ReadTiles:
    """Ray Data stage: positions -> one row holding all tiles of their chunks, one after the other.

    Columns in: `position` int64. Columns out: those of `TileReader.read`, each packed into one
    value (`pack_chunk`), so that it crosses to the workers without a copy.
    """

    def __init__(
        self, plan: Shared, order: ChunkOrder, config: TileReaderConfig, meter: str = ""
    ) -> None:
        cv2.setNumThreads(1)  # the actor's share is one core
        self.reader = TileReader(plan.get(), order, config)
        self.reporter = Reporter(meter, READERS)
        self._room = np.empty((0, *tile_shape(self.reader.plan)), np.uint8)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        positions = table.column("position").to_pylist()
        ends = np.cumsum([self.reader.num_tiles(position) for position in positions])
        # The same memory task after task, for what was returned is copied into the object store
        # by then; new memory would cost as much again as filling it.
        if len(self._room) < ends[-1]:
            self._room = np.empty((ends[-1], *self._room.shape[1:]), np.uint8)
        parts = []
        for position, pixels in zip(positions, np.split(self._room, ends)[:-1], strict=True):
            parts.append(self.reader.read(position, pixels))
            for stage in (READ, DETECT, PERTURB):
                seconds = parts[-1][f"{stage}_s"]
                self.reporter.add(stage, seconds=float(seconds.sum()), done=len(seconds))
        columns = {
            name: self._room[: ends[-1]]
            if name == "pixels"
            else np.concatenate([part[name] for part in parts])
            for name in parts[0]
        }
        yield pack_chunk(columns)


class ReadChunks:
    """Ray Data stage: chunk number -> one row with its kept tiles, nothing done to them."""

    def __init__(self, plan: Shared, meter: str = "", tries: ReadTries | None = None) -> None:
        cv2.setNumThreads(1)  # the actor's share is one core
        self.tiles = ChunkTiles(plan.get(), tries)
        self.reporter = Reporter(meter, READERS)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for chunk in table.column("position").to_pylist():
            began = time.perf_counter()
            columns = self.tiles.read(chunk)
            seconds = time.perf_counter() - began
            self.reporter.add(READ, seconds=seconds, done=len(columns["tile_id"]))
            yield pack_chunk(columns)


def tile_shape(plan: ReadPlan) -> tuple[int, int, int]:
    """Shape of a tile's pixels."""
    return plan.tile_px, plan.tile_px, 3


def pack_chunk(columns: dict[str, np.ndarray]) -> pa.Table:
    """Columns of n tiles as an Arrow table of one row: numbers as bytes, strings as lists.

    Numbers are not copied: the table looks at the arrays' own memory.
    """
    packed = {}
    for name, values in columns.items():
        if values.dtype.kind == "U":
            packed[name] = pa.array([values.tolist()], pa.list_(pa.string()))
        else:
            data = np.ascontiguousarray(values)
            kind = json.dumps([values.dtype.str, list(values.shape)])
            ends = np.array([0, data.nbytes], np.int64)
            buffers = [None, pa.py_buffer(ends), pa.py_buffer(data)]
            packed[f"{name}|{kind}"] = pa.Array.from_buffers(pa.large_binary(), 1, buffers)
    return pa.table(packed)


def unpack_chunk(table: pa.Table) -> dict[str, np.ndarray]:
    """The tiles that `pack_chunk` packed.

    Numbers are read-only views of the block, nothing is copied.
    """
    columns = {}
    for field_name in table.column_names:
        column = table.column(field_name)
        name, _, kind = field_name.partition("|")
        if kind:
            dtype, shape = json.loads(kind)
            columns[name] = np.frombuffer(_only_value(column), dtype).reshape(shape)
        else:
            columns[name] = np.array(column[0].as_py(), dtype=np.str_)
    return columns


def _only_value(column: pa.ChunkedArray) -> pa.Buffer:
    """The bytes of a large_binary column of one row (Arrow's own scalar would be a copy)."""
    array = next(chunk for chunk in column.chunks if len(chunk))
    _, ends, data = array.buffers()
    first, last = np.frombuffer(ends, np.int64)[array.offset : array.offset + 2].tolist()
    return data.slice(first, last - first)


def tile_blocks(
    plan: Shared,
    order: ChunkOrder,
    config: TileReaderConfig,
    share: Share,
    *,
    start: int,
    stop: int,
    reserved_cpus: float,
    reserved_gpus: float,
    meter: str = "",
) -> Iterator[tuple[Any, range]]:
    """Run the stream: references of blocks and the positions in each, in reading order.

    Args:
        plan: the `ReadPlan`.
        order: reading order.
        config: what to do to each tile.
        share: CPUs of the stages.
        start: first position.
        stop: position after the last.
        reserved_cpus: CPUs that training workers hold, not to be planned with.
        reserved_gpus: likewise.
        meter: name of the meter the readers report to.
    """
    if config.tries is not None:
        config = replace(config, tries=config.tries.renewed(secrets.token_hex(8)))
    options = ray.data.DataContext.get_current().execution_options
    options.exclude_resources = type(options.exclude_resources)(
        cpu=reserved_cpus, gpu=reserved_gpus
    )
    tile_bytes = math.prod(tile_shape(plan.get()))
    together = min(max(_BLOCK_BYTES // (TILES_PER_CHUNK * tile_bytes), 1), _CHUNKS_PER_TASK)
    dataset = chunk_dataset(
        ReadTiles,
        (plan, order, config, meter),
        start=start,
        stop=stop,
        cpus_source=share.cpus_source,
        cpus_per_reader=share.cpus_per_reader,
        min_readers=share.min_readers,
        max_readers=share.max_readers,
        together=together,
    )
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            positions = range(start, min(start + together, stop))
            yield entry.ref, positions
            start = positions.stop


def chunk_dataset(
    stage: type,
    arguments: tuple[Any, ...],
    *,
    start: int,
    stop: int,
    cpus_per_reader: float,
    max_readers: int,
    min_readers: int = 1,
    cpus_source: float = 0.1,
    together: int = _CHUNKS_PER_TASK,
) -> ray.data.Dataset:
    """Positions [start, stop) through reading actors, in order; a block is a row of the stage.

    Args:
        stage: `ReadTiles` or `ReadChunks`.
        arguments: of its constructor.
        start: first position.
        stop: position after the last.
        cpus_per_reader: CPUs of an actor.
        max_readers: actors at most, and at first: Ray Data adds them seconds apart.
        min_readers: actors without which nothing starts.
        cpus_source: CPUs of the task that lists the positions.
        together: positions that a reader is given at once.
    """
    quiet_data_context()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # Blocks are passed on when they are larger than this: positions by the task, int64 each, and
    # every row of tiles for itself.
    context.target_max_block_size = 8 * together - 1
    # A reader works a task through without waiting for its blocks to be fetched: with Ray Data's
    # two in waiting it stands still for more than half of the time.
    context._max_num_blocks_in_streaming_gen_buffer = _CHUNKS_PER_TASK
    return ray.data.read_datasource(
        Positions(start, stop, together=together),
        num_cpus=cpus_source,
        override_num_blocks=1,
        concurrency=1,  # lists that wait for their turn would hold the CPUs of readers
    ).map_batches(
        stage,  # type: ignore[arg-type]
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus_per_reader,
        compute=ray.data.ActorPoolStrategy(
            min_size=min_readers,
            max_size=max_readers,
            initial_size=max_readers,
            # Ray Data looks for finished tasks every 0.1 s where one of many is slow; with two
            # tasks each readers run dry meanwhile.
            max_tasks_in_flight_per_actor=4,
        ),
    )


def quiet_data_context() -> None:
    """Settings every dataset of ours runs under; called in the process that executes it."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = -1
    context.memory_usage_poll_interval_s = None  # a thread that starts and ends with every task
    logging.getLogger("ray.data").setLevel(logging.ERROR)
