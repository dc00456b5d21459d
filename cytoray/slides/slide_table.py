"""The slide table: one row a slide, all that later jobs need to plan without opening it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from cytoray.errors import InputError, SlideError
from cytoray.slides.foreground import DEFAULT_KEEP_SHARE, Foreground, slide_foreground
from cytoray.slides.grid import Grid, SlideGrid
from cytoray.slides.mpp import ResolvedMpp, resolve_mpp
from cytoray.slides.quarantine import row_from_error
from cytoray.slides.reader import SlideInfo, open_slide
from cytoray.slides.remote import is_remote, local_path, remote_fingerprint
from cytoray.spool import SPOOL_ROWS, iter_taken, spool_rows, spool_table, write_parquet_batches

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute

STATUS_OK = "ok"

# Sizes in level-0 pixels, mpp in um per level-0 pixel. keep_masks: one uint64 per chunk in
# row-major order on the grid (grid_mpp, grid_tile_px), bit i set where tile i is used.
# num_nuclei is null until nuclei are detected. z_paths, z_planes: of a slide of several focal
# planes the planes' files (null where one file holds them), and the plane each chunk is read from.
# status is `ok` or the quarantine's reason code.
SLIDE_SCHEMA = pa.schema(
    [
        ("slide_id", pa.string()),
        ("path", pa.string()),
        ("patient_id", pa.string()),
        ("site", pa.string()),
        ("split", pa.string()),
        ("width_px_level0", pa.int64()),
        ("height_px_level0", pa.int64()),
        ("vendor", pa.string()),
        ("num_levels", pa.int32()),
        ("level_downsamples", pa.list_(pa.float64())),
        ("mpp_x", pa.float64()),
        ("mpp_y", pa.float64()),
        ("mpp_source", pa.string()),
        ("objective_power", pa.float64()),
        ("reader", pa.string()),
        ("reader_reason", pa.string()),
        ("foreground_share", pa.float64()),
        ("grid_mpp", pa.float64()),
        ("grid_tile_px", pa.int32()),
        ("chunk_columns", pa.int32()),
        ("chunk_rows", pa.int32()),
        ("keep_masks", pa.list_(pa.uint64())),
        ("num_tiles", pa.int64()),
        ("num_nuclei", pa.int64()),
        ("focus_median", pa.float32()),
        ("out_of_focus_share", pa.float32()),
        ("z_paths", pa.list_(pa.string())),
        ("z_planes", pa.list_(pa.uint8())),
        ("status", pa.string()),
        ("file_size_bytes", pa.int64()),
        ("file_mtime_ns", pa.int64()),
    ]
)
IDENTITY = ("slide_id", "path", "patient_id", "site", "split")


def slide_schema(manifest_schema: pa.Schema, label_columns: Iterable[str]) -> pa.Schema:
    """`SLIDE_SCHEMA` followed by the manifest's label columns with their own types.

    Raises:
        InputError: a label column has the name of a column of the slide table.
    """
    fields = list(SLIDE_SCHEMA)
    for name in label_columns:
        if name in SLIDE_SCHEMA.names:
            raise InputError(f"rename the manifest column `{name}`: the slide table uses the name")
        fields.append(manifest_schema.field(name))
    return pa.schema(fields)


def fingerprint(path: str) -> tuple[int | None, int | None]:
    """(size in bytes, modification time in ns) of a file; (None, None) when there is none.

    For a URL as the store states them: one look-up, remembered by the process.
    """
    if is_remote(path):
        return remote_fingerprint(path)
    try:
        status = os.stat(local_path(path))
    except OSError:
        return None, None
    return status.st_size, status.st_mtime_ns


def describe_slide(
    info: SlideInfo, mpp: ResolvedMpp, layout: SlideGrid, foreground: Foreground
) -> dict[str, Any]:
    """The columns of a slide's row that come from its file."""
    return {
        "width_px_level0": info.width_px_level0,
        "height_px_level0": info.height_px_level0,
        "vendor": info.vendor,
        "num_levels": info.num_levels,
        "level_downsamples": list(info.level_downsamples),
        "mpp_x": mpp.mpp_x,
        "mpp_y": mpp.mpp_y,
        "mpp_source": mpp.source,
        "objective_power": info.objective_power,
        "reader": info.reader,
        "reader_reason": info.reader_reason,
        "foreground_share": foreground.foreground_share,
        "grid_mpp": layout.grid.mpp,
        "grid_tile_px": layout.grid.tile_px,
        "chunk_columns": layout.chunk_columns,
        "chunk_rows": layout.chunk_rows,
        "keep_masks": foreground.keep_masks,
        "num_tiles": foreground.num_tiles,
    }


def inspect_slide(
    row: Mapping[str, Any],
    grid: Grid,
    *,
    local_path: str = "",
    reader: str = "auto",
    keep_share: float = DEFAULT_KEEP_SHARE,
    trust_manifest_mpp: bool = False,
    stage: str = "index",
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Open one slide and write its row; a slide that cannot be used is quarantined.

    Args:
        row: the slide's row of the manifest (label columns are kept as they are).
        grid: tile size and mpp.
        local_path: where the file lies when the manifest gives a URL.
        reader: see `open_slide`.
        keep_share: least foreground share of a tile that is used.
        trust_manifest_mpp: see `resolve_mpp`.
        stage: written to the quarantine row.

    Returns:
        The row of the slide table (columns of `SLIDE_SCHEMA` and the manifest's others), and the
        quarantine row or None.
    """
    path = local_path or row["path"]
    result: dict[str, Any] = dict.fromkeys(SLIDE_SCHEMA.names)
    extras = {k: v for k, v in row.items() if k not in SLIDE_SCHEMA.names and k not in ("mpp", "z")}
    result |= {name: row.get(name) for name in IDENTITY} | extras
    result["file_size_bytes"], result["file_mtime_ns"] = fingerprint(path)
    try:
        with open_slide(path, reader=reader) as slide:
            info = slide.info
            mpp = resolve_mpp(info, row.get("mpp"), trust_manifest_mpp=trust_manifest_mpp)
            layout = SlideGrid.of(grid, info.width_px_level0, info.height_px_level0, mpp)
            foreground = slide_foreground(slide, layout, keep_share=keep_share)
        result |= describe_slide(info, mpp, layout, foreground)
        result["status"] = STATUS_OK
        return result, None
    except (SlideError, OSError) as error:
        fault = row_from_error(row["slide_id"], row["path"], stage, error)
        result["status"] = fault["reason_code"]
        return result, fault


def grid_of_row(row: Mapping[str, Any]) -> SlideGrid:
    """The `SlideGrid` of a row of the slide table."""
    return SlideGrid(
        grid=Grid(tile_px=row["grid_tile_px"], mpp=row["grid_mpp"]),
        width_px_level0=row["width_px_level0"],
        height_px_level0=row["height_px_level0"],
        mpp_x=row["mpp_x"],
        mpp_y=row["mpp_y"],
    )


def write_slide_table(
    rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], schema: pa.Schema
) -> pa.Table:
    """Write the slide table sorted by slide_id, whole or not at all; returns it.

    The file depends on the rows alone, not on the order they come in; a few thousand of them are
    held in memory at once, and the table returned is backed by a temporary file.

    Args:
        rows: rows of `inspect_slide`; keys not in `schema` are left out.
        path: a Parquet file.
        schema: see `slide_schema`.
    """
    table = spool_rows(rows, schema)
    order = pc.sort_indices(table["slide_id"]).to_numpy()
    if (order[1:] < order[:-1]).any():
        table = spool_table(iter_taken(table, order.astype(np.int64), SPOOL_ROWS), schema)
    write_parquet_batches(table, path)
    return table


def iter_slide_table(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows of a slide table in batches, in its order.

    Args:
        path: a Parquet file.
        columns: those wanted; None: all.

    Raises:
        InputError: there is none, or it is not a slide table.
    """
    with _open_slide_table(path) as file:
        yield from file.iter_batches(SPOOL_ROWS, columns=columns, use_threads=False)


def read_slide_table(path: str | os.PathLike[str]) -> pa.Table:
    """Read a slide table; it is backed by a temporary file, not by memory.

    Raises:
        InputError: there is none, or it is not a slide table.
    """
    with _open_slide_table(path) as file:
        batches = file.iter_batches(SPOOL_ROWS, use_threads=False)
        return spool_table(batches, file.schema_arrow.remove_metadata())


def _open_slide_table(path: str | os.PathLike[str]) -> pq.ParquetFile:
    if not os.path.isfile(path):
        raise InputError(f"no slide table at {os.fspath(path)}; run `cytoray index` first")
    try:
        file = pq.ParquetFile(path, buffer_size=1 << 20)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"slide table {os.fspath(path)} cannot be read: {error}") from error
    missing = [name for name in SLIDE_SCHEMA.names if name not in file.schema_arrow.names]
    if missing:
        file.close()
        raise InputError(
            f"{os.fspath(path)} is not a slide table of this version (it lacks "
            f"{', '.join(missing)}); run `cytoray index` again"
        )
    return file
