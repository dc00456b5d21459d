"""Labelled cell images: a folder per class, or a CSV; classes, groups and a given split.

A folder: `<class>/<image>`, or `train|val|test/<class>/<image>`. A CSV: a path (relative to the
CSV), a label, and optionally a group and a split (`train`, `val`, `test`). A group is what must
stay in one part: the patient, or the image the cell was cut from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cytoray.errors import InputError, choose, raise_problems
from cytoray.evaluation.splits import PARTS, Split, check_no_leak, given_split, train_val_test
from cytoray.text_table import TextTable, read_text_table

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
PATH_COLUMNS = ("path", "image", "file", "filename")
LABEL_COLUMNS = ("label", "class")
GROUP_COLUMNS = ("group", "patient_id", "patient", "source_image", "slide_id")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a CSV to read, and how to tell groups in a folder.

    Attributes:
        path: of the image; empty: the first of `PATH_COLUMNS` that is there.
        label: empty: the first of `LABEL_COLUMNS`.
        group: empty: the first of `GROUP_COLUMNS`, if any.
        group_pattern: for a folder: a regular expression whose first bracket, found in the file's
            name, is its group (within the class), e.g. `^([0-9]+)_`.
    """

    path: str = ""
    label: str = ""
    group: str = ""
    group_pattern: str = ""

    def __post_init__(self) -> None:
        if not self.group_pattern:
            return
        try:
            brackets = re.compile(self.group_pattern).groups
        except re.error as error:
            raise InputError(f"group pattern {self.group_pattern!r}: {error}") from None
        if brackets < 1:
            raise InputError(f"group pattern {self.group_pattern!r} needs a bracket: (...)")


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Labelled images.

    Attributes:
        names: (N,) path of each, as given: relative to the folder or CSV.
        paths: (N,) path of each to open.
        labels: (N,) int64, index into `classes`.
        classes: names, sorted.
        groups: (N,) str; each image its own where none were given.
        grouped: whether groups were given.
        split: (N,) str of `PARTS`, or None.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray
    grouped: bool
    split: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def without(self, rows: Sequence[int]) -> Cells:
        """All but some images; the classes stay.

        Raises:
            InputError: no image is left, or none of a class.
        """
        keep = np.setdiff1d(np.arange(len(self)), np.asarray(rows, dtype=np.int64))
        kept = replace(
            self,
            names=tuple(self.names[i] for i in keep),
            paths=tuple(self.paths[i] for i in keep),
            labels=self.labels[keep],
            groups=self.groups[keep],
            split=None if self.split is None else self.split[keep],
        )
        gone = sorted(set(range(len(self.classes))) - set(kept.labels.tolist()))
        if not len(kept):
            raise InputError(f"not one of the {len(self)} images can be read")
        raise_problems(
            "classes without a readable image:", [f"class {self.classes[i]!r}" for i in gone]
        )
        return kept


def read_cells(source: str | Path, columns: Columns | None = None) -> Cells:
    """Read the list of labelled images; the images themselves are not opened.

    Args:
        source: a folder with one folder per class, or a CSV.
        columns: see `Columns`.

    Raises:
        InputError: nothing there, missing columns or values, a path twice, or fewer than two
            classes; all problems at once.
    """
    source, columns = Path(source), columns or Columns()
    if source.is_dir():
        table = _folder_rows(source, columns)
        if not table["name"]:
            raise InputError(f"{source} holds no image ({', '.join(SUFFIXES)})")
    elif source.is_file():
        table = _csv_rows(source, columns)
    else:
        raise InputError(f"no folder or CSV of labelled images at {source}")
    root = source if source.is_dir() else source.parent
    classes = tuple(sorted(set(table["label"])))
    if len(classes) < 2:
        raise InputError(
            f"{source} holds one class only ({', '.join(classes)}); a classifier needs at least two"
        )
    return Cells(
        names=tuple(table["name"]),
        paths=tuple(os.path.join(root, name) for name in table["name"]),
        labels=np.array([classes.index(label) for label in table["label"]], dtype=np.int64),
        classes=classes,
        groups=np.array(table["group"] if "group" in table else table["name"], dtype=str),
        grouped="group" in table,
        split=np.array(table["split"], dtype=str) if "split" in table else None,
    )


def _folder_rows(folder: Path, columns: Columns) -> dict[str, list[str]]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    names = [path.relative_to(folder) for path in files if path.name[0] != "."]
    tops = {name.parts[0] for name in names}
    has_split = bool(tops) and tops <= set(PARTS)
    depth = 2 if has_split else 1
    loose = [str(name) for name in names if len(name.parts) <= depth]
    raise_problems(
        f"images in {folder} must lie in a folder per class "
        "(CLASS/image.jpg, or train|val|test/CLASS/image.jpg):",
        loose,
    )
    empty = sorted(
        {p.name for p in _class_folders(folder, has_split)} - {n.parts[depth - 1] for n in names}
    )
    raise_problems(
        f"class folders in {folder} without an image ({', '.join(SUFFIXES)}); remove them or add "
        "images:",
        empty if names else [],
    )
    table = {
        "name": [name.as_posix() for name in names],
        "label": [name.parts[depth - 1] for name in names],
    }
    if has_split:
        table["split"] = [name.parts[0] for name in names]
    if columns.group_pattern:
        pattern = re.compile(columns.group_pattern)
        found = [pattern.search(name.name) for name in names]
        raise_problems(
            f"group pattern {columns.group_pattern!r} is not found in these names:",
            [str(name) for name, match in zip(names, found, strict=True) if match is None],
        )
        table["group"] = [
            f"{label}/{match[1]}"
            for label, match in zip(table["label"], found, strict=True)
            if match is not None
        ]
    return table


def _class_folders(folder: Path, has_split: bool) -> list[Path]:
    parts = [folder / part for part in PARTS] if has_split else [folder]
    found = [path for part in parts if part.is_dir() for path in part.iterdir()]
    return [path for path in found if path.is_dir() and path.name[0] not in "._"]


def _csv_rows(path: Path, columns: Columns) -> dict[str, list[str]]:
    rows = read_text_table(path)
    there = list(rows.columns)
    wanted = {
        "name": _column("path", columns.path, PATH_COLUMNS, there, path),
        "label": _column("label", columns.label, LABEL_COLUMNS, there, path),
        "group": _column("group", columns.group, GROUP_COLUMNS, there, path, needed=False),
        "split": "split" if "split" in there and any(rows.columns["split"]) else "",
    }
    table = {key: rows.columns[name] for key, name in wanted.items() if name}
    _check_csv(table, rows, path)
    return table


def _column(
    what: str,
    asked: str,
    known: tuple[str, ...],
    there: list[str],
    path: Path,
    *,
    needed: bool = True,
) -> str:
    """The column to read, or an empty string."""
    if asked:
        return choose(f"{what} column", asked, there)
    found = next((name for name in known if name in there), "")
    if needed and not found:
        raise InputError(
            f"{path} has none of the columns {', '.join(known)}; name its {what} column with "
            f"--columns.{what} (there: {', '.join(there)})"
        )
    return found


def _check_csv(table: dict[str, list[str]], rows: TextTable, path: Path) -> None:
    names = table["name"]
    if not names:
        raise InputError(f"{path} has no rows; add one per image")
    said = {"name": "path"}
    problems = [
        f"{rows.where(row)} ({names[row] or 'no path'}): no {said.get(what, what)}"
        for what, values in table.items()
        for row, value in enumerate(values)
        if not value
    ]
    problems += [
        f"{rows.where(row)} ({names[row]}): split {part!r} is none of {', '.join(PARTS)}"
        for row, part in enumerate(table.get("split", []))
        if part and part not in PARTS
    ]
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        if name and seen.setdefault(name, row) != row:
            problems.append(f"{rows.where(row)}: {name} stands in {rows.where(seen[name])} already")
    raise_problems(f"{path} cannot be used:", problems)


def split_cells(
    cells: Cells,
    *,
    val_fraction: float = 0.15,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> Split:
    """Train, validation and test parts that keep groups whole; a given split is used as it is.

    A given split without a validation part has one cut from its training part.

    Args:
        cells: the images.
        val_fraction: share of the groups to choose by.
        test_fraction: share of the groups to test on.
        seed: of the shuffle.

    Raises:
        InputError: a group in two parts, a part without images or without one of the classes, or
            too few groups to split.
    """
    if cells.split is None:
        fractions = (1.0 - val_fraction - test_fraction, val_fraction, test_fraction)
        names = np.array(cells.classes)[cells.labels]
        return train_val_test(names, cells.groups, fractions, seed, unit="group")
    split = given_split(cells.split, cells.groups, unit="group")
    train, val = split.train, split.val
    if len(train) and not len(val):
        share = val_fraction / (1.0 - test_fraction)
        cut = train_val_test(
            np.array(cells.classes)[cells.labels[train]],
            cells.groups[train],
            (1.0 - share, share, 0.0),
            seed,
            unit="group",
        )
        train, val = train[cut.train], train[cut.val]
    made = Split(train, val, split.test)
    problems = []
    for name in ("train", "test"):
        missing = set(range(len(cells.classes))) - set(cells.labels[getattr(made, name)].tolist())
        problems += [f"no {cells.classes[i]!r} in {name}" for i in sorted(missing)]
    raise_problems("the given split cannot be used:", problems)
    check_no_leak(cells.groups, made._asdict(), unit="group")
    return made
