"""The checks of a manifest: those of single rows batch by batch, those across rows by hashes.

Across rows, texts are replaced by numbers (`group_numbers`), so that a million rows are compared in
a few arrays of eight bytes a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from cytoray.slides.manifest_source import SHOWN_PER_CHECK
from cytoray.slides.readers_base import MAX_PLAUSIBLE_MPP, MIN_PLAUSIBLE_MPP
from cytoray.spool import BATCH_ROWS, take_rows

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute

MAX_SLIDE_ID_BYTES = 150
# Slide ids name files and parts of ids, on every file system; ":" separates parts of a tile id.
UNSAFE_SLIDE_ID = r'[/\\:*?"<>|\x00-\x1f]|^[\s.]|[\s.]$'


class RowChecks:
    """Problems of single rows, the first few of each kind spelled out, the rest counted.

    Args:
        where: says where rows stand in the file: `line 7`.
    """

    def __init__(self, where: Callable[..., str]) -> None:
        self.where = where
        self._shown: dict[str, list[str]] = {}
        self._count: dict[str, int] = {}
        self._more: dict[str, str] = {}

    def add(self, kind: str, lines: Iterable[str], count: int, more: str) -> None:
        """Note `count` problems of one kind, of which `lines` tell at least the first few."""
        shown = self._shown.setdefault(kind, [])
        shown += list(lines)[: SHOWN_PER_CHECK - len(shown)]
        self._count[kind] = self._count.get(kind, 0) + count
        self._more[kind] = more

    def check(self, batch: pa.RecordBatch, first_row: int) -> None:
        """Look at a batch with canonical columns; `first_row` is the number of its first row."""
        slide_ids = batch.column("slide_id")
        for kind, flags, text in _row_faults(slide_ids, batch.column("path"), batch.column("mpp")):
            self._flag(kind, flags, slide_ids, first_row, text)

    def _flag(self, kind: str, flags: Any, slide_ids: Any, first_row: int, text: str) -> None:
        rows = pc.indices_nonzero(flags)
        if not len(rows):
            return
        lines = []
        for row in rows[:SHOWN_PER_CHECK].to_pylist():
            slide_id = slide_ids[row].as_py()
            who = f"slide {slide_id!r}" if slide_id else "the row"
            lines.append(f"{self.where(row + first_row)}: {who} {text}")
        self.add(kind, lines, len(rows), f"more rows where it {text}")

    def problems(self) -> list[str]:
        """All of them, kind by kind."""
        found = []
        for kind in sorted(self._shown, key=_kind_order):
            found += self._shown[kind]
            left = self._count[kind] - len(self._shown[kind])
            if left:
                found.append(f"... and {left} {self._more[kind]}")
        return found


def _kind_order(kind: str) -> tuple[int, str]:
    """Values that cannot be read come first."""
    return (0 if kind.startswith("value ") else 1, kind)


def _row_faults(slide_ids: Any, paths: Any, mpp: Any) -> list[tuple[str, Any, str]]:
    """(kind, bool column, what is wrong) of each check of a row."""
    empty_id = is_empty(slide_ids)
    present = pc.fill_null(slide_ids, "x")
    unsafe = pc.and_(pc.match_substring_regex(present, UNSAFE_SLIDE_ID), pc.invert(empty_id))
    plausible = pc.and_(pc.greater(mpp, MIN_PLAUSIBLE_MPP), pc.less(mpp, MAX_PLAUSIBLE_MPP))
    return [
        ("1 empty id", empty_id, "has an empty slide_id"),
        (
            "2 unsafe id",
            unsafe,
            'cannot name a file; leave out / \\ : * ? " < > |, and dots or spaces at the ends',
        ),
        (
            "3 long id",
            pc.greater(pc.binary_length(present), MAX_SLIDE_ID_BYTES),
            f"has an id longer than {MAX_SLIDE_ID_BYTES} bytes",
        ),
        ("4 empty path", is_empty(paths), "has an empty path"),
        (
            "5 mpp",
            pc.invert(pc.fill_null(plausible, True)),
            f"has an mpp outside {MIN_PLAUSIBLE_MPP:g} - {MAX_PLAUSIBLE_MPP:g} um per pixel; "
            "leave it empty to use the file's own",
        ),
    ]


def is_empty(column: Any) -> Any:
    """bool column: null, or nothing but spaces."""
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)


def group_numbers(column: Any) -> np.ndarray:
    """Number the distinct texts of a column; equal texts get equal numbers, and only they.

    Texts are told apart by 64-bit hashes, and every text is then compared with the first of its
    group; should two of them collide, all are hashed anew.

    Args:
        column: chunked array of text, N rows.

    Returns:
        int64 (N,), numbered from 0 in the order of first occurrence; -1 for null.
    """
    for salt in itertools.count():
        hashes = np.concatenate(
            [np.zeros(0, np.int64), *(_hashes(chunk, salt) for chunk in column.chunks)]
        )
        _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
        if _no_collision(column, first[group]):
            break
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    numbers = rank[group]
    null = ~column.is_valid().to_numpy()
    if null.any():
        numbers -= numbers > numbers[null][0]
        numbers[null] = -1
    return numbers


def _hashes(chunk: Any, salt: int) -> np.ndarray:
    texts = chunk.to_pylist()
    salted = (hash((salt, text)) for text in texts) if salt else map(hash, texts)
    return np.fromiter(salted, np.int64, len(texts))


def _no_collision(column: Any, first: np.ndarray) -> bool:
    """Whether every text equals the one in the row `first` (N,) of its group."""
    table = pa.table({"text": column})
    later = np.flatnonzero(first != np.arange(len(first)))
    for low in range(0, len(later), BATCH_ROWS):
        rows = later[low : low + BATCH_ROWS]
        mine, theirs = (take_rows(table, r).column(0) for r in (rows, first[rows]))
        same = pc.or_kleene(pc.equal(mine, theirs), pc.and_(mine.is_null(), theirs.is_null()))
        if not pc.all(pc.fill_null(same, False)).as_py():
            return False
    return True


def split_problems(rows: pa.Table) -> list[str]:
    """Patients whose slides are in several splits; `rows` has `patient_id` and `split`."""
    patients, splits = group_numbers(rows["patient_id"]), group_numbers(rows["split"])
    with_split = np.flatnonzero(splits >= 0)
    order = with_split[np.lexsort((splits[with_split], patients[with_split]))]
    mine, theirs = patients[order], splits[order]
    changes = (mine[1:] == mine[:-1]) & (theirs[1:] != theirs[:-1])
    torn = np.unique(mine[1:][changes])
    problems = []
    for patient in torn[:SHOWN_PER_CHECK]:
        here = order[mine == patient]
        one_each = here[np.unique(splits[here], return_index=True)[1]]
        some = take_rows(rows.select(["patient_id", "split"]), one_each[:SHOWN_PER_CHECK])
        names = ", ".join(sorted(some["split"].to_pylist()))
        problems.append(
            f"patient {some['patient_id'][0].as_py()!r} is in several splits ({names}); all slides "
            "of a patient belong in one"
        )
    if len(torn) > SHOWN_PER_CHECK:
        problems.append(f"... and {len(torn) - SHOWN_PER_CHECK} more patients in several splits")
    return problems


def cast_one_by_one(
    column: Any, name: str, kind: pa.DataType, first_row: int, checks: RowChecks
) -> pa.Array:
    """Numbers of a column that has values which are none; those are reported and become null."""
    whole = pa.types.is_integer(kind)
    convert: Callable[[Any], float] = _whole if whole else float
    wanted = "a whole number" if whole else "a number"
    values: list[float | None] = []
    bad: list[tuple[int, Any]] = []
    for row, value in enumerate(column.to_pylist(), first_row):
        try:
            values.append(None if value is None else convert(value))
        except (TypeError, ValueError, OverflowError):
            values.append(None)
            bad.append((row, value))
    if bad:
        lines = [
            f"{checks.where(row)}: {name} {value!r} is not {wanted}"
            for row, value in bad[:SHOWN_PER_CHECK]
        ]
        checks.add(f"value {name}", lines, len(bad), f"more bad values of {name}")
    return pa.array(values, kind)


def _whole(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    return int(value)
