"""What there is to read, known from the slide table alone: every chunk that holds a kept tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cytoray.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """Chunks of all usable slides, in slide-table order.

    Attributes:
        slides: the rows of the slide table that can be read.
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
        return int(np.bitwise_count(self.keep_mask).sum())

    def tiles_in_chunk(self, chunk: int) -> int:
        return int(np.bitwise_count(self.keep_mask[chunk]))

    def slide_of(self, chunks: np.ndarray) -> np.ndarray:
        """Slide row of each chunk number; int64 (N,) -> int64 (N,)."""
        return np.searchsorted(self.first_chunk, chunks, side="right") - 1


def make_plan(slides: pa.Table, *, tile_px: int, mpp: float) -> ReadPlan:
    """List the chunks that hold at least one kept tile.

    Args:
        slides: slide table with `status` and `keep_masks` (list<uint64>, one per chunk, row-major).
        tile_px: tile side the masks were made for.
        mpp: um/px the masks were made for.

    Raises:
        InputError: no usable tile at all.
    """
    usable = np.asarray([s == "ok" for s in slides.column("status").to_pylist()], dtype=bool)
    slides = slides.filter(pa.array(usable)).combine_chunks()
    masks = slides.column("keep_masks").combine_chunks()
    if isinstance(masks, pa.ChunkedArray):
        masks = masks.chunk(0) if masks.num_chunks else pa.array([], pa.list_(pa.uint64()))
    lengths = masks.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = masks.flatten().to_numpy(zero_copy_only=False).astype(np.uint64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    index = np.arange(len(flat)) - np.repeat(starts[:-1], lengths)
    kept = flat != 0
    owner = np.repeat(np.arange(len(lengths)), lengths)[kept]
    first = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(lengths)))])
    if not kept.any():
        raise InputError(
            "no slide has a tile to use: every slide is quarantined or without foreground; "
            "see quarantine.parquet and the QC page of the index"
        )
    return ReadPlan(
        slides=slides,
        tile_px=tile_px,
        mpp=mpp,
        first_chunk=first.astype(np.int64),
        chunk_index=index[kept].astype(np.int32),
        keep_mask=flat[kept],
    )
