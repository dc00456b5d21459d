"""The quarantine ledger: every slide or region that could not be used, and why."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from cytoray.errors import SlideError
from cytoray.slides.remote import redact
from cytoray.spool import SPOOL_ROWS, iter_taken, spool_rows, spool_table, write_parquet_batches

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute

# slide_id; path as read; stage (index, embed, ...); region (a tile id, a level's rectangle, empty
# for the whole slide); reason_code for machines; message for people; time_utc in microseconds.
QUARANTINE_SCHEMA = pa.schema(
    [
        ("slide_id", pa.string()),
        ("path", pa.string()),
        ("stage", pa.string()),
        ("region", pa.string()),
        ("reason_code", pa.string()),
        ("message", pa.string()),
        ("time_utc", pa.timestamp("us", tz="UTC")),
    ]
)
KEY = ("slide_id", "stage", "region", "reason_code")


def quarantine_row(
    slide_id: str, path: str, stage: str, reason_code: str, message: str, region: str = ""
) -> dict[str, Any]:
    """One row of the ledger, stamped with the present time; secrets in URLs are starred out."""
    return {
        "slide_id": slide_id,
        "path": redact(path),
        "stage": stage,
        "region": region,
        "reason_code": reason_code,
        "message": redact(message),
        "time_utc": datetime.now(UTC),
    }


def row_from_error(slide_id: str, path: str, stage: str, error: Exception) -> dict[str, Any]:
    """The ledger row of an exception; anything but a `SlideError` gets the code `unexpected`."""
    if isinstance(error, SlideError):
        return quarantine_row(slide_id, path, stage, error.code, error.message, error.region)
    text = f"{type(error).__name__}: {error}"
    return quarantine_row(slide_id, path, stage, "unexpected", text)


def read_quarantine(path: str | os.PathLike[str]) -> pa.Table:
    """The ledger at `path`, backed by a temporary file; an empty one when there is none."""
    if not os.path.exists(path):
        return QUARANTINE_SCHEMA.empty_table()
    with pq.ParquetFile(path) as file:
        batches = file.iter_batches(SPOOL_ROWS, use_threads=False)
        tables = (pa.Table.from_batches([batch]).cast(QUARANTINE_SCHEMA) for batch in batches)
        return spool_table(tables, QUARANTINE_SCHEMA)


def write_quarantine(rows: Iterable[dict[str, Any]], path: str | os.PathLike[str]) -> pa.Table:
    """Write a ledger of just these rows, whole or not at all; returns it.

    A few thousand rows are held in memory at once; the table is backed by a temporary file.
    """
    table = spool_rows(rows, QUARANTINE_SCHEMA)
    write_parquet_batches(table, path)
    return table


def merge_quarantine(
    rows: Iterable[dict[str, Any]],
    path: str | os.PathLike[str],
    *,
    redone: Collection[str] = (),
    stage: str = "",
) -> pa.Table:
    """Add rows to the ledger at `path`, the newest row winning for the same fault.

    Args:
        rows: see `quarantine_row`.
        path: a Parquet file, made when missing.
        redone: slides worked on anew in `stage`; their old rows of that stage are dropped, so
            that a mended slide leaves the ledger.
        stage: the stage that `redone` refers to.

    Returns:
        The ledger as written, sorted by slide, stage and region.
    """
    old = read_quarantine(path)
    again = pc.and_(
        pc.equal(old["stage"], stage),
        pc.is_in(old["slide_id"], value_set=pa.array(list(redone), pa.string())),
    )
    kept = np.flatnonzero(~again.to_numpy())
    parts = [*iter_taken(old, kept, SPOOL_ROWS), spool_rows(rows, QUARANTINE_SCHEMA)]
    both = pa.concat_tables(parts) if parts else old
    # Sorted by fault and age: of the rows of one fault the last is the newest
    keys = pa.table({name: both[name] for name in KEY}).append_column(
        "age", pa.array(np.arange(both.num_rows))
    )
    order = pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names]).to_numpy()
    order = order.astype(np.int64)
    ordered = spool_table(iter_taken(both, order, SPOOL_ROWS), QUARANTINE_SCHEMA)
    newest = np.flatnonzero(~_same_as_next(ordered))
    table = spool_table(iter_taken(ordered, newest, SPOOL_ROWS), QUARANTINE_SCHEMA)
    write_parquet_batches(table, path)
    return table


def _same_as_next(ordered: pa.Table) -> np.ndarray:
    """bool (N,): the row after it has the same fault."""
    same = np.ones(ordered.num_rows, bool)
    same[-1:] = False
    for name in KEY:
        column = ordered[name]
        same[:-1] &= pc.equal(column[:-1], column[1:]).to_numpy()
    return same
