"""Labelled slides and their bags, as a search reads them once for all its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.errors import InputError, choose, raise_problems
from cytoray.mil.bags import Bag, BagMeta, BagStore
from cytoray.mil.base import MISSING
from cytoray.mil.coarse import coarsen
from cytoray.mil.folds import joined_groups
from cytoray.mil.train import LabelledBag
from cytoray.slides import SLIDE_SCHEMA, read_slide_table


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Labelled slides.

    Attributes:
        slide_ids: N slides.
        labels: int64 (N,), or (N, tasks) with -1 where a task has no label.
        tasks: class names of each task, by its label column.
        groups: (N,) str: slides of one group go together, and are resampled together.
        split: (N,) the manifest's split, or None a slide.
        leak_columns: what may not straddle two parts of a given split, by its name.
        left_out: ids of slides that are not used, by the reason.
    """

    slide_ids: list[str]
    labels: np.ndarray
    tasks: dict[str, tuple[str, ...]]
    groups: np.ndarray
    split: list[str | None]
    leak_columns: dict[str, list[Any]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    @property
    def task_classes(self) -> int | tuple[int, ...]:
        """C, or one C a task."""
        counts = tuple(len(names) for names in self.tasks.values())
        return counts[0] if len(counts) == 1 else counts

    @property
    def unit(self) -> str:
        """What `groups` are, in the plural, for people."""
        by = list(self.leak_columns)
        return f"groups (same {' or '.join(by)})" if len(by) > 1 else "patients"

    def label(self, i: int) -> int | tuple[int, ...]:
        """The label of a slide as a trial takes it."""
        row = self.labels[i]
        return int(row) if self.labels.ndim == 1 else tuple(row.tolist())

    def ids(self, indices: np.ndarray) -> list[str]:
        """Slide ids of a part."""
        return [self.slide_ids[i] for i in indices]

    def task_labels(self) -> dict[str, np.ndarray]:
        """(N,) int64 of each task, -1 where missing."""
        columns = self.labels[:, None] if self.labels.ndim == 1 else self.labels
        return {task: columns[:, place] for place, task in enumerate(self.tasks)}


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The bags of a cohort by one encoder, in the cohort's order.

    Attributes:
        name: for people.
        encoder_id: the encoder that made them.
        features: (N_i, D) float16 of each slide.
        tile_ids: tile ids of each slide, in bag order.
        coarse: (M_i, D) of each slide at larger tiles; empty where no trial needs it.
    """

    name: str
    encoder_id: str
    features: list[np.ndarray]
    tile_ids: list[tuple[str, ...]]
    coarse: list[np.ndarray] = field(default_factory=list)

    def bags(self, cohort: Cohort, indices: np.ndarray) -> list[LabelledBag]:
        """Bags of a part with their labels."""
        return [
            LabelledBag(
                cohort.slide_ids[i],
                self.features[i],
                cohort.label(i),
                self.coarse[i] if self.coarse else None,
            )
            for i in indices
        ]


def read_cohort(
    slide_table: Path, label_columns: Sequence[str], stores: Sequence[BagStore], group: str = ""
) -> Cohort:
    """Labels and groups of the usable slides that have a label and a bag in every store.

    Args:
        slide_table: written by `cytoray index`.
        label_columns: one task each.
        stores: bags, one store an encoder.
        group: a further column whose values may not straddle parts; empty: the patient alone.

    Raises:
        InputError: no such column, a label with fewer than two classes, bags of slides that the
            index does not know, or no slide left.
    """
    table = read_slide_table(slide_table)
    others = [name for name in table.column_names if name not in SLIDE_SCHEMA.names]
    for column in label_columns:
        choose("label column", column, others)
    if group:
        choose("group column", group, [*others, "site"])
    rows = table.to_pylist()
    _check_bags({row["slide_id"] for row in rows}, stores)
    used, left_out = _usable(rows, label_columns, stores)
    tasks, labels = _labels(used, label_columns)
    leak_columns = {"patient": [row["patient_id"] for row in used]}
    if group:
        leak_columns[group] = [row[group] for row in used]
    return Cohort(
        slide_ids=[row["slide_id"] for row in used],
        labels=labels,
        tasks=tasks,
        groups=joined_groups(leak_columns),
        split=[row["split"] for row in used],
        leak_columns=leak_columns,
        left_out=left_out,
    )


def _check_bags(known: set[str], stores: Sequence[BagStore]) -> None:
    """Refuse bags that do not go together, or of slides that the index does not know; all at once.

    Features are not read here; NaN is caught when they are.
    """
    problems = []
    for store in stores:
        problems += [
            f"bag {name} in {store.folder}: the index does not know this slide; index it, or move "
            "the bag away"
            for name in store.slide_ids
            if name not in known
        ]
        try:
            store.check()
        except InputError as error:
            problems += error.problems or [str(error)]
    raise_problems("some bags cannot be used:", problems)


def _usable(
    rows: list[dict[str, Any]], label_columns: Sequence[str], stores: Sequence[BagStore]
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Rows to use, and the others by the reason."""
    used: list[dict[str, Any]] = []
    left_out: dict[str, list[str]] = {}
    for row in rows:
        without = [store.folder for store in stores if row["slide_id"] not in store]
        if all(row[column] is None for column in label_columns):
            reason = "no label"
        elif row["status"] != "ok":
            reason = "quarantined"
        elif without:
            reason = f"no bag in {without[0]}"
        else:
            used.append(row)
            continue
        left_out.setdefault(reason, []).append(row["slide_id"])
    if not used:
        reasons = [f"{len(ids)}: {reason}" for reason, ids in left_out.items()]
        raise InputError("no slide can be used", reasons)
    return used, left_out


def _labels(
    rows: list[dict[str, Any]], columns: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], np.ndarray]:
    """Class names and labels of each task."""
    tasks, coded, problems = {}, [], []
    for column in columns:
        values = [row[column] for row in rows]
        names = tuple(sorted({str(value) for value in values if value is not None}))
        if len(names) < 2:
            problems.append(
                f"label {column!r} has {len(names)} class(es) among the {len(rows)} slides that "
                "have a bag; two are needed"
            )
        tasks[column] = names
        coded.append([MISSING if v is None else names.index(str(v)) for v in values])
    if len(problems) == 1:
        raise InputError(problems[0])
    raise_problems("these labels cannot be learnt:", problems)
    table = np.array(coded, dtype=np.int64).T
    return tasks, table[:, 0] if len(columns) == 1 else table


def read_features(
    store: BagStore,
    slide_ids: Sequence[str],
    *,
    name: str = "",
    coarse: bool | BagStore = False,
) -> FeatureSet:
    """The bags of the slides, read once.

    Args:
        store: the bags.
        slide_ids: the cohort's slides.
        name: shown for this encoder; default: the encoder's name in the bags.
        coarse: add the second scale: bags of larger tiles, or, if true, means of 2 x 2 tiles.

    Raises:
        InputError: bags with NaN, none or another width (every such bag is named), or a second
            scale by another encoder or of no larger tiles.
    """
    bags = _read_bags(store, slide_ids)
    meta, second = bags[0].meta, []
    if isinstance(coarse, BagStore):
        larger = _read_bags(coarse, slide_ids)
        _check_coarser(meta, larger[0].meta, coarse)
        second = [bag.features for bag in larger]
    elif coarse:
        second = [_coarse(bag) for bag in bags]
    return FeatureSet(
        name=name or meta.encoder_name or meta.encoder_id,
        encoder_id=meta.encoder_id,
        features=[bag.features for bag in bags],
        tile_ids=[bag.tile_ids for bag in bags],
        coarse=second,
    )


def _read_bags(store: BagStore, slide_ids: Sequence[str]) -> list[Bag]:
    store.check(slide_ids)

    def read(slide_id: str) -> Bag | InputError:
        try:
            return store.read(slide_id, dtype=np.float16)
        except InputError as error:
            return error

    with ThreadPoolExecutor(max_workers=8) as pool:
        found = list(pool.map(read, slide_ids))
    problems = [
        problem
        for bag in found
        if isinstance(bag, InputError)
        for problem in (bag.problems or [str(bag)])
    ]
    raise_problems(f"some bags in {store.folder} cannot be used; embed the slides again:", problems)
    return [bag for bag in found if isinstance(bag, Bag)]


def _check_coarser(fine: BagMeta, coarse: BagMeta, store: BagStore) -> None:
    problems = []
    if coarse.encoder_id != fine.encoder_id:
        problems.append(f"made by encoder {coarse.encoder_id}, the bags by {fine.encoder_id}")
    if coarse.tile_px * coarse.mpp <= fine.tile_px * fine.mpp:
        sizes = [f"{meta.tile_px * meta.mpp:g} um" for meta in (coarse, fine)]
        problems.append(f"tiles of {sizes[0]} are no larger than the bags' {sizes[1]}")
    raise_problems(f"the bags of {store.folder} cannot be the coarse scale:", problems)


def _coarse(bag: Bag) -> np.ndarray:
    view = coarsen(bag.features, bag.coordinates_level0, bag.meta.tile_size_level0)
    return view.astype(np.float16)


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names that tell the encoders apart: a number is added to those that come again."""
    counts: dict[str, int] = {}
    made = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        made.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return made


def cohort_facts(cohort: Cohort, folds: Sequence[Any]) -> dict[str, Any]:
    """What the reports say of the slides."""
    facts: dict[str, Any] = {
        "slides": len(cohort.slide_ids),
        cohort.unit: len(set(cohort.groups.tolist())),
    }
    for task, names in cohort.tasks.items():
        column = cohort.task_labels()[task]
        counts = [f"{name}: {int((column == i).sum())}" for i, name in enumerate(names)]
        facts[task if len(cohort.tasks) > 1 else "classes"] = ", ".join(counts)
    if len(folds) == 1:
        facts |= {f"{part} slides": len(getattr(folds[0], part)) for part in ("train", "val",
                                                                              "test")}  # fmt: skip
    else:
        facts["folds"] = len(folds)
    return facts | {f"left out, {reason}": len(ids) for reason, ids in cohort.left_out.items()}


def check_task_support(
    aggregators: Mapping[str, bool], tasks: Mapping[str, tuple[str, ...]]
) -> None:
    """Refuse several labels for aggregators of one task.

    Args:
        aggregators: name -> whether it takes several tasks.
        tasks: the labels.

    Raises:
        InputError: names the aggregators that cannot.
    """
    if len(tasks) == 1:
        return
    raise_problems(
        f"{len(tasks)} labels at once need aggregators of several tasks; leave these out, or tune "
        "one label at a time:",
        [f"{name} learns one task" for name, several in aggregators.items() if not several],
    )
