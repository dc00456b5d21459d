"""The manifest: which slides there are. Checked whole, every problem reported at once.

A million rows are read in batches and kept in a file: the process itself holds a few numbers a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from cytoray.errors import raise_problems
from cytoray.slides.manifest_checks import (
    RowChecks,
    cast_one_by_one,
    group_numbers,
    is_empty,
    split_problems,
)
from cytoray.slides.manifest_source import ColumnTypes, ManifestSource, convert_text
from cytoray.slides.z_stacks import STACK_COLUMNS, find_stacks, plane_problems, stacked_rows
from cytoray.spool import TableSpool, spool_table

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute

_GIVEN_COLUMNS: dict[str, pa.DataType] = {
    "slide_id": pa.string(),
    "path": pa.string(),
    "patient_id": pa.string(),
    "site": pa.string(),
    "mpp": pa.float64(),
    "split": pa.string(),
    "z": pa.int64(),
}
# The columns every manifest table has after reading, in this order; the rest follow.
CANONICAL_COLUMNS: dict[str, pa.DataType] = _GIVEN_COLUMNS | STACK_COLUMNS
REQUIRED_COLUMNS = ("slide_id", "path")
MAX_LABEL_VALUES = 50
ABSOLUTE_PATH = r"^([A-Za-z][A-Za-z0-9+.\-]*://|[/\\]|[A-Za-z]:[/\\])"


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    Attributes:
        path: where it was read from.
        rows: one row a slide in the manifest's order, with the columns of `CANONICAL_COLUMNS`
            (path made absolute or a URL; patient_id filled with slide_id where it is missing;
            site, mpp, split and z null where they are missing) followed by all other columns.
            Backed by a nameless temporary file, not by memory. Rows with one slide_id and a z each
            are the planes of one slide: `path` and `z` are those of the plane nearest to z = 0 (of
            two, the lower), `z_paths` and `z_values` list all planes, ascending in z; both are null
            for a slide of one row.
        label_columns: other columns that can serve as slide labels: at most 50 distinct whole
            numbers or short texts.
    """

    path: str
    rows: pa.Table
    label_columns: tuple[str, ...]

    def __len__(self) -> int:
        return self.rows.num_rows

    def iter_rows(self, batch_size: int = 4096) -> Iterator[dict[str, Any]]:
        """Rows as plain dicts, in bounded memory."""
        for batch in self.rows.to_batches(max_chunksize=batch_size):
            yield from batch.to_pylist()


def read_manifest(
    path: str | os.PathLike[str], *, spool_dir: str | os.PathLike[str] | None = None
) -> Manifest:
    """Read and check a manifest (CSV in UTF-8, or Parquet), local or by fsspec URL.

    Args:
        path: the manifest.
        spool_dir: folder for the temporary file behind the rows; None: the system's.

    Raises:
        InputError: with every problem found: unreadable file, missing columns, no rows, empty or
            duplicate or unsafe slide ids, empty paths, bad mpp or z values, a patient in several
            splits, planes of a slide that disagree, or no file at any of the paths. A few missing
            files are not a problem here: those slides are quarantined.
    """
    source = ManifestSource(os.fspath(path))
    what = f"{source.source} is not a usable manifest:"
    problems = source.problems
    raise_problems(what, _missing_columns(source))
    given = _read_rows(source, spool_dir)
    if not given.rows.num_rows:
        raise_problems(what, [*problems, "it has no rows; add one row per slide"])
    slides = group_numbers(given.rows["slide_id"])
    stacks, repeats = find_stacks(given.rows, slides, source.where)
    problems += [*given.problems, *repeats, *split_problems(given.rows)]
    if stacks.any and not repeats:
        labels = label_columns(given.rows)
        problems += plane_problems(given.rows, stacks, labels, source.where)
    if not problems and not _any_file(given.rows["path"]):
        problems.append(
            f"none of the {given.rows.num_rows} files exists, e.g. "
            f"{given.rows['path'][0].as_py()}; paths are taken relative to the manifest's folder"
        )
    raise_problems(what, problems)
    rows = spool_table(_final_batches(given, stacks), given.final_schema(), spool_dir)
    pa.default_memory_pool().release_unused()
    return Manifest(path=source.source, rows=rows, label_columns=label_columns(rows))


def _missing_columns(source: ManifestSource) -> list[str]:
    found = ", ".join(source.names) or "none"
    problems = [
        f"column `{name}` is missing (columns found: {found})"
        for name in REQUIRED_COLUMNS
        if name not in source.names
    ]
    made = [name for name in STACK_COLUMNS if name in source.names]
    problems += [
        f"rename column `{name}`: the name is used for the planes of a slide" for name in made
    ]
    return [*source.problems, *problems] if problems else []


@dataclass(frozen=True)
class _Given:
    """All rows of the file with canonical columns, and what is wrong with single rows."""

    rows: pa.Table
    types: dict[str, pa.DataType]
    problems: list[str]

    def final_schema(self) -> pa.Schema:
        return pa.schema([*CANONICAL_COLUMNS.items(), *self.types.items()])


def _read_rows(source: ManifestSource, spool_dir: str | os.PathLike[str] | None) -> _Given:
    others = [name for name in source.names if name not in _GIVEN_COLUMNS]
    found = ColumnTypes(others)
    checks = RowChecks(source.where)
    folder = _folder_of(source.source)
    spool: TableSpool | None = None
    types: dict[str, pa.DataType] = dict.fromkeys(others, pa.null())
    count = 0
    try:
        for raw in source.batches():
            columns = {
                name: _canonical(raw, name, kind, count, checks)
                for name, kind in _GIVEN_COLUMNS.items()
            }
            columns["patient_id"] = pc.if_else(
                is_empty(columns["patient_id"]), columns["slide_id"], columns["patient_id"]
            )
            columns |= {name: _plain(raw.column(name)) for name in others}
            checks.check(pa.record_batch(columns), count)
            columns["path"] = _absolute_paths(columns["path"], folder)
            batch = pa.record_batch(columns)
            if not source.is_parquet:
                for name in others:
                    found.look(name, batch.column(name))
            types = {name: batch.schema.field(name).type for name in others}
            spool = spool or TableSpool(batch.schema, spool_dir)
            spool.write(batch)
            count += batch.num_rows
        rows = spool.table() if spool else pa.schema([*_GIVEN_COLUMNS.items()]).empty_table()
    finally:
        if spool:
            spool.close()
    if not source.is_parquet:
        types = {name: found.type_of(name) for name in others}
    return _Given(rows, types, checks.problems())


def _final_batches(given: _Given, stacks: Any) -> Iterator[pa.Table]:
    """Rows as `Manifest` has them: one a slide, columns of a CSV with their types."""
    schema = given.final_schema()
    for batch in stacked_rows(given.rows, stacks):
        columns = {}
        for name in schema.names:
            column = batch[name]
            kind = given.types.get(name)
            if kind is not None and kind != column.type:
                column = pa.chunked_array([convert_text(c, kind) for c in column.chunks], kind)
            columns[name] = column
        yield pa.table(columns, schema=schema)


def _plain(column: Any) -> Any:
    """Dictionary columns (categories) as their values: an Arrow file has one dictionary only."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _canonical(
    raw: pa.RecordBatch, name: str, kind: pa.DataType, first_row: int, checks: RowChecks
) -> Any:
    """A canonical column with its type, nulls where it is absent; bad values are reported."""
    if name not in raw.schema.names:
        return pa.nulls(raw.num_rows, kind)
    column = _plain(raw.column(name))
    if pa.types.is_string(kind):
        return column.cast(pa.string())
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return pc.utf8_trim_whitespace(column).cast(kind)
        return column.cast(kind)
    except pa.ArrowInvalid:
        return cast_one_by_one(column, name, kind, first_row, checks)


def _folder_of(source: str) -> str:
    if "://" in source:
        return source.rsplit("/", 1)[0].rstrip("/")
    return str(Path(source).resolve().parent).rstrip("/")


def _absolute_paths(paths: Any, folder: str) -> Any:
    paths = pc.utf8_trim_whitespace(paths)
    joined = pc.binary_join_element_wise(folder, paths, "/")
    return pc.if_else(pc.match_substring_regex(paths, ABSOLUTE_PATH), paths, joined)


def _any_file(paths: Any) -> bool:
    """Whether any local file exists; a URL is taken on trust until it is opened."""
    for chunk in paths.chunks:
        for path in chunk:
            text = path.as_py()
            if text and ("://" in text or os.path.exists(text)):
                return True
    return False


def label_columns(rows: pa.Table) -> tuple[str, ...]:
    """Columns beyond the canonical ones that can serve as slide labels."""
    others = [name for name in rows.column_names if name not in CANONICAL_COLUMNS]
    return tuple(name for name in others if _is_label(rows[name]))


def _is_label(column: Any) -> bool:
    """Few distinct whole numbers, truth values or short plain texts, each used repeatedly."""
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return False
    values: set[Any] = set()
    for chunk in column.chunks:  # one after another: a column of a million ids must not pile up
        values.update(pc.unique(chunk.drop_null()).slice(0, MAX_LABEL_VALUES + 1).to_pylist())
        if len(values) > MAX_LABEL_VALUES:
            return False
    rows = len(column) - column.null_count
    if not values or (len(values) == rows and rows > 3):
        return False
    if not is_text:
        return True
    return all(len(v) <= 100 and not v.lstrip().startswith(("[", "{")) for v in values)
