"""Labelled features out of folders of bags: one vector a slide (its mean), or a tile.

The labels are a CSV or Parquet table with `slide_id` or `tile_id`, a label, and optionally a group
(the patient) and a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.errors import InputError, choose, raise_problems
from cytoray.finetune.cells import GROUP_COLUMNS, LABEL_COLUMNS, Cells, Columns
from cytoray.mil import BagStore, open_bags
from cytoray.slides import parse_tile_id
from cytoray.text_table import TextTable, read_text_table


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labelled slides or tiles.

    Attributes:
        cells: the examples; `names` are the ids.
        unit: `slide_id` or `tile_id`.
        unlabelled: ids of the table's other rows, each with its line.
    """

    cells: Cells
    unit: str
    unlabelled: tuple[str, ...]


def read_labels(path: Path, columns: Columns | None = None) -> Labels:
    """Labels of slides or tiles.

    Args:
        path: CSV or Parquet.
        columns: `label` and `group`, where they are not called as usual.

    Raises:
        InputError: no such file or columns, an id twice or missing, no labels, or fewer than two
            classes.
    """
    columns = columns or Columns()
    table = read_text_table(path)
    there = list(table.columns)
    unit = next((name for name in ("tile_id", "slide_id") if name in there), "")
    if not unit:
        raise InputError(f"{path} needs a column tile_id or slide_id (there: {', '.join(there)})")
    label = columns.label or next((name for name in LABEL_COLUMNS if name in there), "")
    choose("label column", label or "label", there)
    wanted = ("patient_id", *GROUP_COLUMNS)
    group = columns.group or next((n for n in wanted if n in there and n != unit), "")
    if columns.group:
        choose("group column", group, there)
    labelled, unlabelled = _labelled_rows(table, path, unit, label)
    names = tuple(labelled.columns[unit])
    classes = tuple(sorted(set(labelled.columns[label])))
    if len(classes) < 2:
        raise InputError(
            f"{path}: column {label!r} has one class only ({', '.join(classes)}); two are needed"
        )
    groups = labelled.columns[group] if group else [_slide_of(name, unit) for name in names]
    split = labelled.columns.get("split", [])
    cells = Cells(
        names=names,
        paths=names,
        labels=np.array([classes.index(name) for name in labelled.columns[label]], dtype=np.int64),
        classes=classes,
        groups=np.array(groups, dtype=str),
        grouped=bool(group) or unit == "tile_id",
        split=np.array(split, dtype=str) if any(split) else None,
    )
    return Labels(cells=cells, unit=unit, unlabelled=unlabelled)


def _labelled_rows(
    table: TextTable, path: Path, unit: str, label: str
) -> tuple[TextTable, tuple[str, ...]]:
    """The rows with a label, and the ids and lines of the others."""
    if not len(table):
        raise InputError(f"{path} has no rows; add one per {unit.removesuffix('_id')}")
    ids, labels = table.columns[unit], table.columns[label]
    rows = [row for row, value in enumerate(labels) if value]
    if not rows:
        raise InputError(
            f"{path}: column {label!r} is empty in all {len(table)} rows; fill it in, or name "
            f"another with --columns.label (there: {', '.join(table.columns)})"
        )
    problems = [f"{table.where(row)}: no {unit}" for row in rows if not ids[row]]
    seen: dict[str, int] = {}
    for row in rows:
        if ids[row] and seen.setdefault(ids[row], row) != row:
            first = table.where(seen[ids[row]])
            problems.append(f"{table.where(row)}: {ids[row]} stands in {first} already")
    raise_problems(f"{path} cannot be used:", problems)
    others = [row for row, value in enumerate(labels) if not value]
    unlabelled = tuple(f"{ids[row] or 'no id'} ({table.where(row)})" for row in others)
    return table.take(rows), unlabelled


def _slide_of(name: str, unit: str) -> str:
    if unit == "slide_id":
        return name
    try:
        return parse_tile_id(name)[0]
    except ValueError as error:
        raise InputError(f"{error}: it should read SLIDE:MPP:TILE_PX:COLUMN_ROW:INDEX") from None


def bag_features(
    stores: Sequence[BagStore], cells: Cells, unit: str
) -> tuple[list[np.ndarray], list[int]]:
    """Features of the labelled slides or tiles in every folder of bags.

    Args:
        stores: folders of bags, of one encoder each.
        cells: the labels.
        unit: `slide_id` or `tile_id`.

    Returns:
        float32 (N, D) of each folder, rows in the order of `cells`, and the rows that one of the
        folders has no features for (their values are 0).
    """
    slides = [_slide_of(name, unit) for name in cells.names]
    rows_of: dict[str, list[int]] = {}
    for row, slide in enumerate(slides):
        rows_of.setdefault(slide, []).append(row)
    missing: set[int] = set()
    made = []
    for store in stores:
        width = store.info(store.slide_ids[0]).width
        features = np.zeros((len(cells), width), dtype=np.float32)
        for slide, rows in rows_of.items():
            if slide not in store:
                missing.update(rows)
                continue
            bag = store.read(slide)
            if unit == "slide_id":
                features[rows] = bag.features.mean(axis=0)
                continue
            places = {name: place for place, name in enumerate(bag.tile_ids)}
            for row in rows:
                place = places.get(cells.names[row])
                if place is None:
                    missing.add(row)
                else:
                    features[row] = bag.features[place]
        made.append(features)
    return made, sorted(missing)


def open_stores(folders: Sequence[Path]) -> dict[str, BagStore]:
    """Folders of bags by the name of their encoder; two of one name by folder as well."""
    stores: dict[str, BagStore] = {}
    for folder in folders:
        store = open_bags(folder)
        meta: Any = store.info(store.slide_ids[0]).meta
        name = meta.encoder_name or meta.encoder_id
        stores[name if name not in stores else f"{name} ({folder})"] = store
    return stores
