"""What there is to read, known from the slide table alone: every chunk that holds a kept tile.

A plan of a million slides is a few numbers a slide and 12 bytes a chunk. It is made batch by batch
and lies in temporary files that are mapped, not in memory; put into an object store it becomes one
shared copy a node, of which each process maps what it looks at.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute

from cytoray.errors import InputError
from cytoray.slides import iter_slide_table
from cytoray.spool import SPOOL_ROWS, ArraySpool, TableSpool

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute

# Chunks counted at once, so that a sum over all of them needs no second array as large.
_COUNTED = 1 << 20
# Rows of slides in one piece: looking up a row takes the longer the more pieces there are.
_ROWS_TOGETHER = 65_536


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """Chunks of all usable slides, in slide-table order.

    Attributes:
        slides: the rows of the slide table that can be read, without the masks.
        tile_px: tile side at `mpp`.
        mpp: um/px of the tiles.
        first_chunk: int64 (num_slides + 1,), chunk number of each slide's first chunk.
        chunk_index: int32 (num_chunks,), row-major index in the slide's grid of chunks.
        keep_mask: uint64 (num_chunks,), bit i set = tile i of the chunk is kept; never 0.
        chunk_numbers: int64, the chunks to read, where a job reads a part of them only.
    """

    slides: pa.Table
    tile_px: int
    mpp: float
    first_chunk: np.ndarray
    chunk_index: np.ndarray
    keep_mask: np.ndarray
    chunk_numbers: np.ndarray | None = None

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_index)

    @property
    def num_tiles(self) -> int:
        parts = range(0, self.num_chunks, _COUNTED)
        return sum(int(np.bitwise_count(self.keep_mask[i : i + _COUNTED]).sum()) for i in parts)

    def tiles_in_chunk(self, chunk: int) -> int:
        return int(np.bitwise_count(self.keep_mask[chunk]))

    def slide_of(self, chunks: np.ndarray) -> np.ndarray:
        """Slide row of each chunk number; int64 (N,) -> int64 (N,)."""
        return np.searchsorted(self.first_chunk, chunks, side="right") - 1


def make_plan(
    slides: pa.Table | Iterable[pa.RecordBatch],
    *,
    tile_px: int,
    mpp: float,
    spool_dir: str | os.PathLike[str] | None = None,
) -> ReadPlan:
    """List the chunks that hold at least one kept tile.

    Args:
        slides: slide table with `status` and `keep_masks` (list<uint64>, one per chunk, row-major),
            or its batches in order.
        tile_px: tile side the masks were made for.
        mpp: um/px the masks were made for.
        spool_dir: folder of the temporary files behind the plan; None: the system's.

    Raises:
        InputError: no usable tile at all.
    """
    whole = isinstance(slides, pa.Table)
    batches: Iterable[Any] = cast(Any, slides).to_batches(SPOOL_ROWS) if whole else slides
    index, mask = ArraySpool(np.int32, spool_dir), ArraySpool(np.uint64, spool_dir)
    counts = ArraySpool(np.int64, spool_dir)
    counts.write(np.zeros(1))
    spool: TableSpool | None = None
    try:
        for batch in batches:
            usable = batch.filter(pc.equal(batch.column("status"), "ok"))
            rows = usable.select([name for name in usable.schema.names if name != "keep_masks"])
            spool = spool or TableSpool(rows.schema, spool_dir, together=_ROWS_TOGETHER)
            spool.write(rows)
            chunk_index, keep_mask, per_slide = _kept_chunks(usable.column("keep_masks"))
            index.write(chunk_index)
            mask.write(keep_mask)
            counts.write(per_slide)
        table = spool.table() if spool else pa.table({})
    finally:
        if spool:
            spool.close()
    plan = ReadPlan(
        slides=table,
        tile_px=tile_px,
        mpp=mpp,
        first_chunk=np.cumsum(counts.array()),
        chunk_index=index.array(),
        keep_mask=mask.array(),
    )
    if not plan.num_chunks:
        raise InputError(
            "no slide has a tile to use: every slide is quarantined or without foreground; "
            "see quarantine.parquet and the QC page of the index"
        )
    return plan


def _kept_chunks(masks: pa.ListArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chunks with a kept tile of some slides.

    Returns:
        chunk_index (N,), keep_mask uint64 (N,), and the number of them of each slide (S,).
    """
    lengths = masks.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = masks.flatten().to_numpy(zero_copy_only=False).astype(np.uint64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    index = np.arange(len(flat)) - np.repeat(starts[:-1], lengths)
    kept = flat != 0
    owner = np.repeat(np.arange(len(lengths)), lengths)[kept]
    return index[kept], flat[kept], np.bincount(owner, minlength=len(lengths))


def plan_of_index(
    index: str | os.PathLike[str],
    splits: Collection[str] = (),
    spool_dir: str | os.PathLike[str] | None = None,
) -> ReadPlan:
    """What an index has to read.

    Args:
        index: folder written by `cytoray index`.
        splits: slides of these splits alone; empty: all.
        spool_dir: folder of the temporary files behind the plan; None: the system's.

    Raises:
        InputError: no index there, or no usable slide or tile in these splits.
    """
    path = os.path.join(index, "slides.parquet")
    for batch in iter_slide_table(path, ["status", "split", "grid_tile_px", "grid_mpp"]):
        first = _wanted(batch, splits).slice(0, 1).to_pylist()
        if first:
            break
    else:
        raise InputError(
            f"no usable slide in {os.fspath(index)} (splits: {', '.join(splits) or 'all'}); see "
            "quarantine.parquet and the QC page of the index"
        )
    return make_plan(
        (_wanted(batch, splits) for batch in iter_slide_table(path)),
        tile_px=first[0]["grid_tile_px"],
        mpp=first[0]["grid_mpp"],
        spool_dir=spool_dir,
    )


def _wanted(batch: pa.RecordBatch, splits: Collection[str]) -> pa.RecordBatch:
    wanted = pc.equal(batch.column("status"), "ok")
    if splits:
        named = pa.array(list(splits), pa.string())
        wanted = pc.and_(wanted, pc.is_in(batch.column("split"), value_set=named))
    return batch.filter(wanted)


def has_nuclei_table(index: str | os.PathLike[str]) -> bool:
    """Whether the nuclei of an index's slides were detected when it was made."""
    batches = iter_slide_table(os.path.join(index, "slides.parquet"), ["num_nuclei"])
    return any(batch.column(0).null_count < batch.num_rows for batch in batches)
