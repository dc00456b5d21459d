"""A manifest as it was written: batches of rows, CSV or Parquet, local or by URL."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq

from cytoray.errors import InputError
from cytoray.spool import BATCH_ROWS
from cytoray.text_table import name_lines, numbered_records

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute

SHOWN_PER_CHECK = 10
# What a CSV column can be, tightest first; what fits none of them is text.
_CSV_TYPES = (
    pa.null(), pa.int64(), pa.bool_(), pa.date32(), pa.timestamp("s"), pa.timestamp("ns"),
    pa.float64(),
)  # fmt: skip


class ManifestSource:
    """The raw rows of a manifest in batches.

    Args:
        source: a path, or an fsspec URL; `.parquet` and `.pq` are Parquet, anything else CSV.

    Attributes:
        names: columns, spaces at their ends removed, each name once.
        problems: with the form of the file; those of its rows are complete when `batches` has
            ended.

    Raises:
        InputError: it cannot be read.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.is_parquet = source.lower().endswith((".parquet", ".pq"))
        self.problems: list[str] = []
        if "://" not in source and not os.path.isfile(source):
            raise InputError(f"no manifest at {source}; give the path of a CSV or Parquet file")
        self._raw_names = self._guarded(self._read_names)
        self.names = list(dict.fromkeys(name.strip() for name in self._raw_names))
        self._check_header()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Rows in order, at most `BATCH_ROWS` at a time; all of a CSV as text.

        Raises:
            InputError: the file breaks off, or is not in UTF-8.
        """
        read = self._parquet_batches if self.is_parquet else self._csv_batches
        batches = read()
        keep = [[n.strip() for n in self._raw_names].index(name) for name in self.names]
        while True:
            batch = self._guarded(lambda: next(batches, None))
            if batch is None:
                return
            columns = [batch.column(i) for i in keep]
            yield pa.RecordBatch.from_arrays(columns, self.names)

    def where(self, *rows: int) -> str:
        """Where rows of `batches` stand in the file, for messages: `line 7`, `lines 7, 9`.

        Lines are an editor's; the rows of a Parquet file are numbered from 1.
        """
        if self.is_parquet:
            return name_lines([row + 1 for row in rows], "row")
        lines, whole = self._records
        return name_lines(lines[1:][whole[1:]][list(rows)].tolist())

    @cached_property
    def _records(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each record of a CSV, its line (int64) and whether it has all its fields (bool).

        Arrow passes over empty lines and does not say where a record begins; the file is read once
        more when there is something to say.
        """
        width = len(self._raw_names)
        with self._open() as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
            found = [(line, len(record) == width) for line, record in numbered_records(text)]
        return np.array([line for line, _ in found]), np.array([whole for _, whole in found])

    def _check_header(self) -> None:
        stripped = [name.strip() for name in self._raw_names]
        repeated = sorted({name for name in stripped if stripped.count(name) > 1})
        self.problems += [
            f"column `{name}` occurs more than once in the header" for name in repeated
        ]
        if len(stripped) == 1 and (";" in stripped[0] or "\t" in stripped[0]):
            self.problems.append("the header has one column; separate the columns with commas")

    def _guarded(self, read: Any) -> Any:
        try:
            return read()
        except (OSError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
            reason = str(error).split("\n", 1)[0]
            if "UTF8" in reason or "UTF-8" in reason:
                reason += "; save the file as UTF-8"
            raise InputError(f"manifest {self.source} cannot be read: {reason}") from error

    def _open(self) -> Any:
        if "://" in self.source:
            return fsspec.open(self.source, "rb").open()  # pyright: ignore
        return open(self.source, "rb")

    def _read_names(self) -> list[str]:
        with self._open() as file:
            if self.is_parquet:
                return pq.read_schema(file).names
            return self._csv_reader(file, None).schema.names

    def _parquet_batches(self) -> Iterator[pa.RecordBatch]:
        # Without these two options a whole row group's compressed columns are held at once
        with self._open() as file, pq.ParquetFile(file, buffer_size=1 << 20) as table:
            yield from table.iter_batches(batch_size=BATCH_ROWS, use_threads=False)

    def _csv_batches(self) -> Iterator[pa.RecordBatch]:
        with self._open() as file:
            yield from self._csv_reader(file, self._raw_names)

    def _csv_reader(self, file: Any, names: list[str] | None) -> pyarrow.csv.CSVStreamingReader:
        """All columns as text: ids such as 0012 keep their zeros, bad numbers their line."""
        bad_rows = 0

        def note(row: pyarrow.csv.InvalidRow) -> str:
            nonlocal bad_rows
            bad_rows += names is not None
            if names is not None and bad_rows <= SHOWN_PER_CHECK:
                line = self._records[0][(row.number or 1) - 1]
                self.problems.append(
                    f"line {line}: {row.actual_columns} fields where the header has "
                    f"{row.expected_columns}"
                )
            return "skip"

        return pyarrow.csv.open_csv(
            file,
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=1 << 20),
            parse_options=pyarrow.csv.ParseOptions(
                newlines_in_values=True, invalid_row_handler=note
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names or [], pa.string()),
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
                null_values=["", "NA", "NaN", "nan", "null", "None"],
            ),
        )


class ColumnTypes:
    """Finds the tightest type that every value of a text column has, batch by batch."""

    def __init__(self, names: Iterable[str]) -> None:
        self._fitting = {name: list(_CSV_TYPES) for name in names}

    def look(self, name: str, column: Any) -> None:
        """Take a batch of a column of text into account."""
        fitting = self._fitting[name]
        self._fitting[name] = [kind for kind in fitting if _cast(column, kind) is not None]

    def type_of(self, name: str) -> pa.DataType:
        """The type all batches so far have in common."""
        return next(iter(self._fitting[name]), pa.string())


def convert_text(column: Any, kind: pa.DataType) -> Any:
    """A column of text with the type that `ColumnTypes` found for it."""
    return column if pa.types.is_string(kind) else _cast(column, kind)


def _cast(column: Any, kind: pa.DataType) -> Any:
    if pa.types.is_null(kind):
        return pa.nulls(len(column)) if column.null_count == len(column) else None
    if pa.types.is_boolean(kind) and not _says_true_or_false(column):
        return None
    try:
        return pc.utf8_trim_whitespace(column).cast(kind)
    except pa.ArrowInvalid:
        return None


def _says_true_or_false(column: Any) -> bool:
    """Only the words: 0 and 1 are numbers."""
    words = pa.array(["true", "false"])
    return bool(pc.all(pc.is_in(pc.utf8_lower(column.drop_null()), value_set=words)).as_py())
