"""Which slides a trial learns on, is chosen by, and is tested on: given splits or k-fold.

Slides that share a patient, or anything else that may not straddle two parts (the image a cell was
cut from), go together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cytoray.errors import InputError, raise_problems
from cytoray.evaluation import check_no_leak, given_split, grouped_kfold, train_val_test
from cytoray.mil.base import MISSING


class Fold(NamedTuple):
    """Indices of slides, int64, sorted.

    Attributes:
        name: empty where there is one fold alone.
        train, val, test: the parts; `test` is empty where nothing is held out.
    """

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def joined_groups(columns: Mapping[str, Sequence]) -> np.ndarray:
    """What must stay together: slides that share a value of any column, directly or by others.

    Args:
        columns: patient, source image, ...: a value for each slide; None shares nothing.

    Returns:
        (N,) str: the first slide's value of the first column of each group.
    """
    first = next(iter(columns.values()))
    parent = list(range(len(first)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for column in columns.values():
        seen: dict[object, int] = {}
        for i, value in enumerate(column):
            if value is not None:
                a, b = root(i), root(seen.setdefault(value, i))
                parent[max(a, b)] = min(a, b)
    return np.array([str(first[root(i)]) for i in range(len(first))])


def strata(labels: np.ndarray, groups: np.ndarray, parts: int) -> np.ndarray:
    """One label a slide to stratify by: (N,) str.

    With several tasks: the combination of a group's highest labels, as far as at least `parts`
    groups share it; a rarer one gives up its last tasks.

    Args:
        labels: (N,) or (N, tasks), -1 where missing.
        groups: (N,) what stays together.
        parts: groups needed of each stratum.
    """
    if labels.ndim == 1:
        return labels.astype(str)
    names, group = np.unique(groups, return_inverse=True)
    highest = np.full((len(names), labels.shape[1]), MISSING)
    np.maximum.at(highest, group, labels)
    length = np.full(len(names), labels.shape[1])
    while True:
        keys = np.array(
            ["/".join(map(str, row[:n])) for row, n in zip(highest, length, strict=True)]
        )
        kinds, kind, counts = np.unique(keys, return_inverse=True, return_counts=True)
        rare = (counts[kind] < parts) & (length > 0)
        if not rare.any():
            break
        length[rare] -= 1
    keys = np.where(counts[kind] < parts, kinds[np.argmax(counts)], keys)
    return keys[group]


def make_folds(
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    folds: int,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    split: Sequence[str | None] | None = None,
    leak_columns: Mapping[str, Sequence] | None = None,
) -> list[Fold]:
    """K folds, each tested once; or, with `folds` 0, the given split or one by fractions.

    Args:
        labels: (N,) or (N, tasks) int64, -1 where missing.
        groups: (N,) what stays together.
        folds: k; 0 for one split.
        val_fraction: share of a fold's other groups to choose by.
        test_fraction: share of groups to test on, where no split is given.
        seed: of the shuffles.
        split: (N,) the manifest's `train`, `val`, `test`; used with `folds` 0.
        leak_columns: what may not straddle two parts of the given split, by its name; with more
            than one, messages speak of groups, not patients.

    Raises:
        InputError: a split that leaks or lacks a part, or too few groups of a class.
    """
    unit = "group" if len(leak_columns or {}) > 1 else "patient"
    if folds:
        made = []
        cut = grouped_kfold(strata(labels, groups, folds), groups, folds, seed, unit=unit)
        for number, (rest, test) in enumerate(cut):
            train, val = _validation(labels, groups, rest, val_fraction, seed + number, unit)
            made.append(Fold(f"fold{number}", train, val, test))
    elif split is not None and any(split):
        made = [_given(labels, groups, split, leak_columns or {}, val_fraction, seed, unit)]
    else:
        rest = 1.0 - test_fraction
        shares = (rest * (1 - val_fraction), rest * val_fraction, test_fraction)
        cut = train_val_test(strata(labels, groups, 3), groups, shares, seed, unit=unit)
        made = [Fold("", *cut)]
    for fold in made:
        parts = {"train": fold.train, "val": fold.val, "test": fold.test}
        check_no_leak(groups, parts, unit=unit)
    return made


def final_fold(
    labels: np.ndarray, groups: np.ndarray, *, val_fraction: float, seed: int, unit: str = "patient"
) -> Fold:
    """All slides to train the head that is handed out, a part of them to choose its epoch by."""
    train, val = _validation(labels, groups, np.arange(len(groups)), val_fraction, seed, unit)
    return Fold("final", train, val, np.zeros(0, np.int64))


def _given(
    labels: np.ndarray,
    groups: np.ndarray,
    split: Sequence[str | None],
    leak_columns: Mapping[str, Sequence],
    val_fraction: float,
    seed: int,
    unit: str,
) -> Fold:
    without = sum(1 for part in split if not part)
    if without:
        raise InputError(
            f"{without} of {len(split)} labelled slides have no `split`: name train, val or test "
            "for each, or leave the column out, or use --folds"
        )
    every = np.arange(len(groups))
    parts = given_split([str(part) for part in split], every)
    problems = [
        f"no labelled slide in split `{name}`" for name in ("train", "test")
        if not len(getattr(parts, name))
    ]  # fmt: skip
    raise_problems("the manifest's `split` column cannot be used:", problems)
    leaks = []
    for what, column in leak_columns.items():
        leaks += _leaks(what, column, parts._asdict())
    raise_problems(
        "the manifest's `split` leaks, so its scores would be too good; put all slides that share "
        "one of these in one part:",
        leaks,
    )
    train, val = parts.train, parts.val
    if not len(val):
        train, val = _validation(labels, groups, train, val_fraction, seed, unit)
    return Fold("", train, val, parts.test)


def _leaks(what: str, column: Sequence, parts: Mapping[str, np.ndarray]) -> list[str]:
    seen: dict[object, dict[str, None]] = {}
    for name, indices in parts.items():
        for i in indices.tolist():
            if column[i] is not None:
                seen.setdefault(column[i], {})[name] = None
    return [
        f"{what} {value} is in {' and '.join(names)}"
        for value, names in seen.items()
        if len(names) > 1
    ]


def _validation(
    labels: np.ndarray,
    groups: np.ndarray,
    rest: np.ndarray,
    val_fraction: float,
    seed: int,
    unit: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The rest of a fold cut in train and val."""
    of_rest = strata(labels[rest], groups[rest], 2)
    shares = (1 - val_fraction, val_fraction, 0.0)
    cut = train_val_test(of_rest, groups[rest], shares, seed, unit=unit)
    return rest[cut.train], rest[cut.val]


def fold_problems(fold: Fold, labels: np.ndarray, tasks: Mapping[str, Sequence[str]]) -> list[str]:
    """What keeps a fold from being trained on, chosen by and tested on."""
    problems = []
    columns = labels[:, None] if labels.ndim == 1 else labels
    for column, task in zip(columns.T, tasks, strict=True):
        where = f"{fold.name + ': ' if fold.name else ''}{task}"
        known = {name: column[getattr(fold, name)] for name in ("train", "val", "test")}
        known = {name: part[part != MISSING] for name, part in known.items()}
        if len(np.unique(known["train"])) < 2:
            problems.append(f"{where}: the training slides have fewer than two classes")
        problems += [
            f"{where}: no {what} slide has a label"
            for name, what in (("val", "validation"), ("test", "test"))
            if not len(known[name]) and len(getattr(fold, name))
        ]
    return problems
