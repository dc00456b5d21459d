"""The manifest: which slides there are. Checked whole, every problem reported at once."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq

from cytoray.errors import InputError, raise_problems
from cytoray.slides.readers_base import MAX_PLAUSIBLE_MPP, MIN_PLAUSIBLE_MPP

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute

# The columns every manifest table has after reading, in this order; the rest follow.
CANONICAL_COLUMNS: dict[str, pa.DataType] = {
    "slide_id": pa.string(),
    "path": pa.string(),
    "patient_id": pa.string(),
    "site": pa.string(),
    "mpp": pa.float64(),
    "split": pa.string(),
    "z": pa.int64(),
}
REQUIRED_COLUMNS = ("slide_id", "path")
MAX_LABEL_VALUES = 50
MAX_SLIDE_ID_BYTES = 150
# Slide ids name files and parts of ids, on every file system; ":" separates parts of a tile id.
UNSAFE_SLIDE_ID = r'[/\\:*?"<>|\x00-\x1f]|^[\s.]|[\s.]$'
ABSOLUTE_PATH = r"^([A-Za-z][A-Za-z0-9+.\-]*://|[/\\]|[A-Za-z]:[/\\])"
SHOWN_PER_CHECK = 10


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    Attributes:
        path: where it was read from.
        rows: one row a slide in the manifest's order, with the columns of `CANONICAL_COLUMNS`
            (path made absolute or a URL; patient_id filled with slide_id where it is missing;
            site, mpp, split and z null where they are missing) followed by all other columns.
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


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and check a manifest (CSV in UTF-8, or Parquet), local or by fsspec URL.

    Raises:
        InputError: with every problem found: unreadable file, missing columns, no rows, empty or
            duplicate or unsafe slide ids, empty paths, bad mpp or z values, a patient in several
            splits, or no file at any of the paths. A few missing files are not a problem here:
            those slides are quarantined.
    """
    source = os.fspath(path)
    table, problems, first_line = _read_table(source)
    missing = [name for name in REQUIRED_COLUMNS if name not in table.column_names]
    if missing:
        names = ", ".join(table.column_names) or "none"
        problems += [f"column `{name}` is missing (columns found: {names})" for name in missing]
        raise_problems(f"{source} is not a usable manifest:", problems)
    if table.num_rows == 0 and not problems:
        problems.append("it has no rows; add one row per slide")
    columns = {}
    for name, kind in CANONICAL_COLUMNS.items():
        columns[name] = _canonical(table, name, kind, first_line, problems)
    problems += _slide_id_problems(columns["slide_id"], first_line)
    problems += _where(
        _empty(columns["path"]), columns["slide_id"], first_line, "has an empty path"
    )
    problems += _mpp_problems(columns["mpp"], columns["slide_id"], first_line)
    patients = pc.if_else(_empty(columns["patient_id"]), columns["slide_id"], columns["patient_id"])
    columns["patient_id"] = patients
    problems += _split_problems(patients, columns["split"])
    columns["path"] = _absolute_paths(columns["path"], source)
    others = [name for name in table.column_names if name not in CANONICAL_COLUMNS]
    columns |= {name: table[name] for name in others}
    rows = pa.table(columns)
    if not problems and not _any_file(rows["path"]):
        problems.append(
            f"none of the {rows.num_rows} files exists, e.g. {rows['path'][0].as_py()}; paths are "
            "taken relative to the manifest's folder"
        )
    raise_problems(f"{source} is not a usable manifest:", problems)
    labels = tuple(name for name in others if _is_label(rows[name]))
    return Manifest(path=source, rows=rows, label_columns=labels)


def _read_table(source: str) -> tuple[pa.Table, list[str], int]:
    """The raw table, problems with its form, and the number of its first data line."""
    try:
        if "://" in source:
            with fsspec.open(source, "rb") as file:
                data: Any = io.BytesIO(file.read())  # pyright: ignore[reportAttributeAccessIssue]
        elif not os.path.isfile(source):
            raise InputError(f"no manifest at {source}; give the path of a CSV or Parquet file")
        else:
            data = source
        if source.lower().endswith((".parquet", ".pq")):
            return pq.read_table(data), [], 1
        return *_read_csv(data), 2
    except (OSError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
        reason = str(error).split("\n", 1)[0]
        if "UTF8" in reason or "UTF-8" in reason:
            reason += "; save the file as UTF-8"
        raise InputError(f"manifest {source} cannot be read: {reason}") from error


def _read_csv(data: Any) -> tuple[pa.Table, list[str]]:
    problems: list[str] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        if len(problems) < SHOWN_PER_CHECK:
            problems.append(
                f"line {row.number}: {row.actual_columns} fields where the header has "
                f"{row.expected_columns}"
            )
        return "skip"

    # Text everywhere it matters: ids such as 0012 must keep their zeros, and numbers are parsed
    # later, so that a bad one is reported with its line.
    table = pyarrow.csv.read_csv(
        data,
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(CANONICAL_COLUMNS, pa.string()),
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
            null_values=["", "NA", "NaN", "nan", "null", "None"],
        ),
    )
    names = [name.strip() for name in table.column_names]
    repeated = sorted({name for name in names if names.count(name) > 1})
    problems += [f"column `{name}` occurs more than once in the header" for name in repeated]
    if repeated:
        keep = [names.index(name) for name in dict.fromkeys(names)]
        table, names = table.select(keep), list(dict.fromkeys(names))
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        problems.append("the header has one column; separate the columns with commas")
    return table.rename_columns(names), problems


def _canonical(
    table: pa.Table, name: str, kind: pa.DataType, first_line: int, problems: list[str]
) -> Any:
    """A canonical column with its type, nulls where it is absent; bad values are reported."""
    if name not in table.column_names:
        return pa.nulls(table.num_rows, kind)
    column = table[name].combine_chunks()
    if pa.types.is_string(kind):
        return column.cast(pa.string())
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return pc.utf8_trim_whitespace(column).cast(kind)
        return column.cast(kind)
    except pa.ArrowInvalid:
        return _cast_one_by_one(column, name, kind, first_line, problems)


def _cast_one_by_one(
    column: Any, name: str, kind: pa.DataType, first_line: int, problems: list[str]
) -> pa.Array:
    wanted = "a whole number" if pa.types.is_integer(kind) else "a number"
    convert = int if pa.types.is_integer(kind) else float
    values, bad = [], 0
    for index, value in enumerate(column.to_pylist()):
        try:
            values.append(None if value is None else convert(value))
        except (TypeError, ValueError):
            values.append(None)
            bad += 1
            if bad <= SHOWN_PER_CHECK:
                problems.append(f"line {index + first_line}: {name} {value!r} is not {wanted}")
    if bad > SHOWN_PER_CHECK:
        problems.append(f"... and {bad - SHOWN_PER_CHECK} more bad values of {name}")
    return pa.array(values, kind)


def _empty(column: Any) -> Any:
    """bool column: null, or nothing but spaces."""
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)


def _where(flags: Any, slide_ids: Any, first_line: int, text: str) -> list[str]:
    """One problem per flagged row, with its line and slide, the first few spelled out."""
    indices = pc.indices_nonzero(flags)
    found = []
    for index in indices[:SHOWN_PER_CHECK].to_pylist():
        slide_id = slide_ids[index].as_py()
        who = f"slide {slide_id!r}" if slide_id else "the row"
        found.append(f"line {index + first_line}: {who} {text}")
    if len(indices) > SHOWN_PER_CHECK:
        found.append(f"... and {len(indices) - SHOWN_PER_CHECK} more rows where it {text}")
    return found


def _slide_id_problems(slide_ids: Any, first_line: int) -> list[str]:
    problems = _where(_empty(slide_ids), slide_ids, first_line, "has an empty slide_id")
    present = pc.fill_null(slide_ids, "x")
    unsafe = pc.match_substring_regex(present, UNSAFE_SLIDE_ID)
    unsafe = pc.and_(unsafe, pc.invert(_empty(slide_ids)))
    text = 'cannot name a file; leave out / \\ : * ? " < > |, and dots or spaces at the ends'
    problems += _where(unsafe, slide_ids, first_line, text)
    too_long = pc.greater(pc.binary_length(present), MAX_SLIDE_ID_BYTES)
    problems += _where(
        too_long, slide_ids, first_line, f"has an id longer than {MAX_SLIDE_ID_BYTES} bytes"
    )
    counts = pc.value_counts(slide_ids.drop_null())
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    for slide_id in repeated[:SHOWN_PER_CHECK].to_pylist():
        lines = pc.indices_nonzero(pc.equal(slide_ids, slide_id)).to_pylist()
        shown = ", ".join(str(line + first_line) for line in lines[:5])
        more = ", ..." if len(lines) > 5 else ""
        problems.append(f"slide_id {slide_id!r} occurs {len(lines)} times (lines {shown}{more})")
    if len(repeated) > SHOWN_PER_CHECK:
        problems.append(f"... and {len(repeated) - SHOWN_PER_CHECK} more repeated slide_ids")
    return problems


def _mpp_problems(mpp: Any, slide_ids: Any, first_line: int) -> list[str]:
    good = pc.and_(pc.greater(mpp, MIN_PLAUSIBLE_MPP), pc.less(mpp, MAX_PLAUSIBLE_MPP))
    bad = pc.and_(pc.invert(pc.fill_null(good, True)), pc.is_valid(mpp))
    text = (
        f"has an mpp outside {MIN_PLAUSIBLE_MPP:g} - {MAX_PLAUSIBLE_MPP:g} um per pixel; leave "
        "it empty to use the file's own"
    )
    return _where(bad, slide_ids, first_line, text)


def _split_problems(patients: Any, splits: Any) -> list[str]:
    pairs = pa.table({"patient_id": patients, "split": splits})
    grouped = pairs.group_by("patient_id").aggregate([("split", "count_distinct")])
    torn = grouped.filter(pc.greater(grouped["split_count_distinct"], 1))["patient_id"]
    problems = []
    for patient in torn[:SHOWN_PER_CHECK].to_pylist():
        mine = pairs.filter(pc.equal(pairs["patient_id"], patient))["split"]
        names = ", ".join(sorted(name for name in pc.unique(mine).to_pylist() if name))
        problems.append(
            f"patient {patient!r} is in several splits ({names}); all slides of a patient belong "
            "in one"
        )
    if len(torn) > SHOWN_PER_CHECK:
        problems.append(f"... and {len(torn) - SHOWN_PER_CHECK} more patients in several splits")
    return problems


def _absolute_paths(paths: Any, source: str) -> Any:
    if "://" in source:
        folder = source.rsplit("/", 1)[0]
    else:
        folder = str(Path(source).resolve().parent)
    paths = pc.utf8_trim_whitespace(paths)
    joined = pc.binary_join_element_wise(folder.rstrip("/"), paths, "/")
    return pc.if_else(pc.match_substring_regex(paths, ABSOLUTE_PATH), paths, joined)


def _any_file(paths: Any) -> bool:
    """Whether any local file exists; a URL is taken on trust until it is opened."""
    for chunk in paths.chunks:
        for path in chunk:
            text = path.as_py()
            if text and ("://" in text or os.path.exists(text)):
                return True
    return False


def _is_label(column: Any) -> bool:
    """Few distinct whole numbers, truth values or short plain texts, each used repeatedly."""
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return False
    values = pc.unique(column.drop_null())
    rows = len(column) - column.null_count
    if not 1 <= len(values) <= MAX_LABEL_VALUES or (len(values) == rows and rows > 3):
        return False
    if not is_text:
        return True
    return all(len(v) <= 100 and not v.lstrip().startswith(("[", "{")) for v in values.to_pylist())
