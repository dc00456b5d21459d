"""Labelled features out of folders of bags: one vector a slide (its mean), or a tile.

The labels are a CSV or Parquet table with `slide_id` or `tile_id`, a label, and optionally a group
(the patient) and a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from cytoray.errors import InputError, choose, raise_problems
from cytoray.finetune.cells import GROUP_COLUMNS, LABEL_COLUMNS, Cells, Columns
from cytoray.mil import BagStore, open_bags
from cytoray.slides import parse_tile_id


def read_labels(path: Path, columns: Columns | None = None) -> tuple[Cells, str]:
    """Labels of slides or tiles; rows without a label are left out.

    Args:
        path: CSV or Parquet.
        columns: `label` and `group`, where they are not called as usual.

    Returns:
        The examples (`names` are the ids) and `slide_id` or `tile_id`.

    Raises:
        InputError: no such file or columns, an id twice, or fewer than two classes.
    """
    columns = columns or Columns()
    frame = _read_table(path)
    there = [str(name) for name in frame.columns]
    unit = next((name for name in ("tile_id", "slide_id") if name in there), "")
    if not unit:
        raise InputError(f"{path} needs a column tile_id or slide_id (there: {', '.join(there)})")
    label = columns.label or next((name for name in LABEL_COLUMNS if name in there), "")
    choose("label column", label or "label", there)
    wanted = ("patient_id", *GROUP_COLUMNS)
    group = columns.group or next((n for n in wanted if n in there and n != unit), "")
    if columns.group:
        choose("group column", group, there)
    frame = frame[frame[label] != ""]
    ids = frame[unit].tolist()
    twice = (
        sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
    )
    raise_problems(f"{path} has ids twice:", twice)
    classes = tuple(sorted(set(frame[label])))
    if len(classes) < 2:
        raise InputError(f"{path}: column {label!r} has {len(classes)} class(es); two are needed")
    groups = frame[group].tolist() if group else [_slide_of(name, unit) for name in ids]
    split = frame["split"].tolist() if "split" in there else []
    cells = Cells(
        names=tuple(ids),
        paths=tuple(ids),
        labels=np.array([classes.index(name) for name in frame[label]], dtype=np.int64),
        classes=classes,
        groups=np.array(groups, dtype=str),
        grouped=bool(group) or unit == "tile_id",
        split=np.array(split, dtype=str) if any(split) else None,
    )
    return cells, unit


def _read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"no table of labels at {path}")
    try:
        if path.suffix.lower() == ".parquet":
            rows = pq.read_table(path).to_pylist()
            return pd.DataFrame([{k: _text(v) for k, v in row.items()} for row in rows])
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _text(value: Any) -> str:
    """A cell of a table as text; nothing for a list and the like."""
    return "" if value is None or isinstance(value, (list, dict)) else str(value)


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
