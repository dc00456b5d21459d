"""Tables larger than memory should be: written to a temporary Arrow file, looked at through a map.

Mapped pages belong to the page cache: the kernel takes them back when memory is short, so they are
no private memory of the process. The file has no name once it is mapped, so nothing is left behind
however the process ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cytoray.io import atomic_path

# Rows of a batch: a few MB of a manifest, so that a table of a million rows is 62 batches.
BATCH_ROWS = 16_384
# The same for rows as Python values, and of the slide table with its masks. It is also the row
# group of the Parquet files, whose bytes so depend on the rows alone.
SPOOL_ROWS = 4096


class TableSpool:
    """Record batches in, a `pyarrow.Table` backed by a nameless temporary file out.

    Args:
        schema: of every batch.
        folder: where the file lies while it is written; None: the system's temporary folder
            (`TMPDIR`).
        together: rows that are held to be written as one batch; a row of a table is looked up the
            faster the fewer batches there are. 0: batches are written as they come.
    """

    def __init__(
        self,
        schema: pa.Schema,
        folder: str | os.PathLike[str] | None = None,
        *,
        together: int = 0,
    ) -> None:
        self.schema = schema
        self._together = together
        self._pending: list[Any] = []
        descriptor, self._path = tempfile.mkstemp(".arrow", ".cytoray-", folder)
        os.close(descriptor)
        self._sink: Any = pa.OSFile(self._path, "wb")
        self._writer: Any = pa.ipc.new_file(self._sink, schema)

    def __enter__(self) -> TableSpool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up what was written, unless `table` was called."""
        if self._writer is not None:
            self._end()
            os.unlink(self._path)

    def write(self, batch: pa.RecordBatch | pa.Table) -> None:
        """Append rows."""
        if not self._together:
            self._writer.write(batch)
            return
        self._pending.append(batch)
        if sum(part.num_rows for part in self._pending) >= self._together:
            self._flush()

    def table(self) -> pa.Table:
        """All rows written; ends the writing."""
        self._flush()
        self._end()
        try:
            source = pa.memory_map(self._path)
        finally:
            os.unlink(self._path)
        return pa.ipc.open_file(source).read_all()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write(pa.Table.from_batches(self._pending, self.schema).combine_chunks())
            self._pending = []

    def _end(self) -> None:
        self._writer.close()
        self._sink.close()
        self._writer = None


def spool_table(
    batches: Iterable[pa.RecordBatch | pa.Table],
    schema: pa.Schema,
    folder: str | os.PathLike[str] | None = None,
) -> pa.Table:
    """All batches as one file-backed table."""
    with TableSpool(schema, folder) as spool:
        for batch in batches:
            spool.write(batch)
        return spool.table()


class RowSpool:
    """Plain dicts in, one after another, a file-backed table out.

    Args:
        schema: of the table; keys not in it are left out, absent ones are null.
        folder: see `TableSpool`.
    """

    def __init__(self, schema: pa.Schema, folder: str | os.PathLike[str] | None = None) -> None:
        self._spool = TableSpool(schema, folder)
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> RowSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self._rows.append({name: row.get(name) for name in self._spool.schema.names})
        if len(self._rows) == SPOOL_ROWS:
            self._flush()

    def table(self) -> pa.Table:
        """All rows; ends the writing."""
        self._flush()
        return self._spool.table()

    def _flush(self) -> None:
        if self._rows:
            self._spool.write(pa.RecordBatch.from_pylist(self._rows, self._spool.schema))
            self._rows = []


def spool_rows(
    rows: Iterable[Mapping[str, Any]],
    schema: pa.Schema,
    folder: str | os.PathLike[str] | None = None,
) -> pa.Table:
    """Plain dicts as one file-backed table, see `RowSpool`."""
    with RowSpool(schema, folder) as spool:
        for row in rows:
            spool.add(row)
        return spool.table()


def write_parquet_batches(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Write a table batch by batch, whole or not at all; the bytes depend on the rows alone."""
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer,
    ):
        for low in range(0, table.num_rows, SPOOL_ROWS):
            writer.write_table(table.slice(low, SPOOL_ROWS).combine_chunks())


class ArraySpool:
    """Pieces of a numpy array in, one read-only array backed by a nameless temporary file out."""

    def __init__(self, dtype: Any, folder: str | os.PathLike[str] | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(prefix=".cytoray-", dir=folder)  # noqa: SIM115

    def write(self, values: np.ndarray) -> None:
        """Append values, converted to the array's type."""
        self._file.write(np.ascontiguousarray(values, self._dtype).data)

    def array(self) -> np.ndarray:
        """All values written, (N,); ends the writing."""
        self._file.flush()
        with self._file:
            if not self._file.tell():
                return np.zeros(0, self._dtype)
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        # A plain array: unlike np.memmap it goes into an object store without a copy on the heap.
        return np.frombuffer(mapped, self._dtype)


def take_rows(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Rows of a chunked table by number, in the order asked for.

    `Table.take` joins all chunks of a column first, in memory; here only the rows taken are held.

    Args:
        table: any table.
        rows: int64 (N,).
    """
    batches = table.to_batches()
    starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches])])
    owner = np.searchsorted(starts, rows, side="right") - 1
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(len(batches) + 1))
    pieces = [
        batch.take(pa.array(rows[order[low:high]] - starts[i]))
        for i, (batch, low, high) in enumerate(zip(batches, bounds[:-1], bounds[1:], strict=True))
        if high > low
    ]
    if not pieces:
        return table.schema.empty_table()
    back = np.empty(len(rows), np.int64)
    back[order] = np.arange(len(rows))
    return pa.Table.from_batches(pieces).combine_chunks().take(pa.array(back))


def iter_taken(
    table: pa.Table, rows: np.ndarray, batch_rows: int = BATCH_ROWS
) -> Iterator[pa.Table]:
    """`take_rows`, `batch_rows` at a time."""
    for low in range(0, len(rows), batch_rows):
        yield take_rows(table, rows[low : low + batch_rows])
