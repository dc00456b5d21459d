"""Tables that users write, as text; what is wrong with a row is said with the row's own line."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cytoray.errors import InputError, raise_problems

_MAX_FIELD_CHARS = 1 << 30
_SHOWN = 10


def numbered_records(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Records of a CSV, each with the line it begins in as an editor counts: the header's is 1.

    Args:
        lines: of the file, opened with `newline=""`.

    Yields:
        Line and fields; empty lines are passed over, and a field may hold ends of lines.
    """
    csv.field_size_limit(_MAX_FIELD_CHARS)  # Python's own limit would refuse long fields
    reader = csv.reader(lines)
    line = 1
    for record in reader:
        if record:
            yield line, record
        line = reader.line_num + 1


def name_lines(numbers: Sequence[int], word: str = "line") -> str:
    """`line 7` or `lines 7, 9`, the first few."""
    more = ", ..." if len(numbers) > _SHOWN else ""
    return f"{word}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:_SHOWN]))}{more}"


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table as it was written.

    Attributes:
        columns: N values by name; spaces at the ends of names and values are removed.
        numbers: N, the line each row begins in (CSV), or its number from 1 (Parquet).
        word: what `numbers` count: `line` or `row`.
    """

    columns: dict[str, list[str]]
    numbers: list[int]
    word: str = "line"

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, *rows: int) -> str:
        """Where rows stand, for messages: `line 7`, `lines 7, 9`."""
        return name_lines([self.numbers[row] for row in rows], self.word)

    def take(self, rows: Sequence[int]) -> TextTable:
        """Some of the rows."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return TextTable(columns=columns, numbers=[self.numbers[i] for i in rows], word=self.word)


def read_text_table(path: Path) -> TextTable:
    """Read a CSV in UTF-8, or a Parquet table (`.parquet`, `.pq`), as text.

    Args:
        path: a local file.

    Raises:
        InputError: there is no such file, it cannot be read, a column's name occurs twice, or lines
            have more or fewer fields than the header.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return _read_parquet(path)
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return _read_csv(path, stream)
    except UnicodeDecodeError:
        raise InputError(f"{path} cannot be read as CSV: save the file as UTF-8") from None
    except (OSError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _read_csv(path: Path, stream: Iterable[str]) -> TextTable:
    records = numbered_records(stream)
    header = [name.strip() for name in next(records, (1, []))[1]]
    problems = []
    if not header:
        problems.append("it is empty; its first line names the columns")
    elif len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        problems.append("the header has one column; separate the columns with commas")
    problems += [
        f"column {name!r} occurs more than once in the header"
        for name in dict.fromkeys(header)
        if header.count(name) > 1
    ]
    kept, numbers = [], []
    for line, record in records:
        if len(record) == len(header):
            kept.append(record)
            numbers.append(line)
        else:
            problems.append(f"line {line}: {len(record)} fields where the header has {len(header)}")
    raise_problems(f"{path} cannot be used:", problems)
    columns = {name: [record[i].strip() for record in kept] for i, name in enumerate(header)}
    return TextTable(columns=columns, numbers=numbers)


def _read_parquet(path: Path) -> TextTable:
    # ParquetFile, not read_table: a folder called `slide_id=x` must not add a column
    with pq.ParquetFile(path) as file:
        table = file.read()
    columns = {
        name: [_text(value) for value in table[name].to_pylist()] for name in table.column_names
    }
    return TextTable(columns=columns, numbers=list(range(1, table.num_rows + 1)), word="row")


def _text(value: Any) -> str:
    """A cell as text; nothing for a list and the like."""
    return "" if value is None or isinstance(value, (list, dict)) else str(value).strip()
