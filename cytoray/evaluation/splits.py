"""Splits that keep a patient whole, balance the labels, and refuse to leak.

Bags of one patient always go together. A patient counts as one of the rarest label among his
bags, so that few positives are spread over all parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cytoray.errors import InputError, raise_problems

PARTS = ("train", "val", "test")


class Split(NamedTuple):
    """Indices of bags, (n,) int64 each, sorted."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def _patients(labels: Sequence | np.ndarray, groups: Sequence | np.ndarray):
    """Patient of each bag (N,), stratum of each patient (G,), bags of each patient (G,)."""
    labels, groups = np.asarray(labels), np.asarray(groups)
    if labels.shape != groups.shape or labels.ndim != 1:
        raise InputError(f"{labels.shape} labels and {groups.shape} patients: give one of each")
    names, patient = np.unique(groups, return_inverse=True)
    classes, label, frequency = np.unique(labels, return_inverse=True, return_counts=True)
    rarity = np.argsort(np.argsort(-frequency, kind="stable"), kind="stable")
    rarest = np.zeros(len(names), dtype=np.int64)
    np.maximum.at(rarest, patient, rarity[label])
    stratum = np.argsort(rarity)[rarest]
    return patient, stratum, np.bincount(patient), classes


def _check_strata(
    stratum: np.ndarray, classes: np.ndarray, parts: int, what: str, unit: str = "patient"
) -> None:
    counts = np.bincount(stratum, minlength=len(classes))
    problems = [
        f"class {name!r} counts {count} {unit}s"
        for name, count in zip(classes.tolist(), counts.tolist(), strict=True)
        if count < parts
    ]
    raise_problems(f"{what} needs at least {parts} {unit}s of every class:", problems)


def grouped_kfold(
    labels: Sequence | np.ndarray,
    groups: Sequence | np.ndarray,
    folds: int = 5,
    seed: int = 0,
    *,
    unit: str = "patient",
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Patient-grouped, label-stratified k-fold.

    Within each class the patients, shuffled, those with most bags first, go one by one to the
    fold that has the fewest bags of the class.

    Args:
        labels: (N,) label of each bag.
        groups: (N,) patient of each bag.
        folds: number of folds.
        seed: of the shuffle.
        unit: what a group is called in the message.

    Returns:
        (rest, held out) indices of bags for each fold; every bag is held out exactly once.

    Raises:
        InputError: fewer than 2 folds, or a class with fewer patients than folds.
    """
    if folds < 2:
        raise InputError(f"cross-validation needs at least 2 folds, got {folds}")
    patient, stratum, sizes, classes = _patients(labels, groups)
    _check_strata(stratum, classes, folds, f"{folds}-fold cross-validation", unit)
    rng = np.random.default_rng(seed)
    fold_of_patient = np.zeros(len(sizes), dtype=np.int64)
    total = np.zeros(folds)
    for index in range(len(classes)):
        members = rng.permutation(np.flatnonzero(stratum == index))
        members = members[np.argsort(-sizes[members], kind="stable")]
        filled = np.zeros(folds)
        for member in members:
            fold = min(range(folds), key=lambda f: (filled[f], total[f]))
            fold_of_patient[member] = fold
            filled[fold] += sizes[member]
            total[fold] += sizes[member]
    fold_of_bag = fold_of_patient[patient]
    return [
        (np.flatnonzero(fold_of_bag != fold), np.flatnonzero(fold_of_bag == fold))
        for fold in range(folds)
    ]


def train_val_test(
    labels: Sequence | np.ndarray,
    groups: Sequence | np.ndarray,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    split: Sequence | np.ndarray | None = None,
    unit: str = "patient",
) -> Split:
    """Patient-grouped, label-stratified train, validation and test parts.

    Args:
        labels: (N,) label of each bag.
        groups: (N,) patient of each bag.
        fractions: share of each class's patients that goes to train, val and test; they sum to 1.
            A part of share 0 stays empty; every other part gets a patient of every class.
        seed: of the shuffle.
        split: (N,) `train`, `val` or `test`, the manifest's own split; it is then used as it is.
        unit: what a group is called in messages.

    Raises:
        InputError: fractions that do not sum to 1, a class with too few patients, unknown names in
            `split`, or a `split` in which a patient straddles two parts.
    """
    if split is not None:
        return given_split(split, groups, unit=unit)
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.shape != (3,) or (shares < 0).any() or abs(shares.sum() - 1.0) > 1e-6:
        raise InputError(f"fractions {fractions} must be three shares >= 0 that sum to 1")
    patient, stratum, sizes, classes = _patients(labels, groups)
    used = shares > 0
    _check_strata(stratum, classes, int(used.sum()), "this split", unit)
    rng = np.random.default_rng(seed)
    part_of_patient = np.zeros(len(sizes), dtype=np.int64)
    for index in range(len(classes)):
        members = rng.permutation(np.flatnonzero(stratum == index))
        parts = np.repeat(np.arange(3), _apportion(len(members), shares))
        part_of_patient[members] = parts
    part_of_bag = part_of_patient[patient]
    return Split(*(np.flatnonzero(part_of_bag == part) for part in range(3)))


def _apportion(count: int, shares: np.ndarray) -> np.ndarray:
    """`count` patients over the parts: one for each used part, the rest by largest remainder."""
    used = (shares > 0).astype(np.int64)
    given = np.maximum(np.floor(count * shares).astype(np.int64), used)
    while given.sum() > count:
        given[np.argmax(np.where(given > used, given - count * shares, -np.inf))] -= 1
    while given.sum() < count:
        given[np.argmax(np.where(used > 0, count * shares - given, -np.inf))] += 1
    return given


def given_split(
    split: Sequence | np.ndarray, groups: Sequence | np.ndarray, *, unit: str = "patient"
) -> Split:
    """The parts a `split` column names, once it is sure that no patient straddles them.

    Raises:
        InputError: values other than train, val and test, or a patient in more than one part.
    """
    values = np.asarray(split)
    unknown = sorted({str(value) for value in values} - set(PARTS))
    if unknown:
        raise InputError(f"split column holds {', '.join(unknown)}; valid: {', '.join(PARTS)}")
    parts = Split(*(np.flatnonzero(values == part) for part in PARTS))
    check_no_leak(groups, parts._asdict(), unit=unit)
    return parts


def check_no_leak(
    groups: Sequence | np.ndarray,
    parts: dict[str, np.ndarray] | Sequence[np.ndarray],
    *,
    unit: str = "patient",
) -> None:
    """Refuse parts that share a patient.

    Args:
        groups: (N,) patient of each bag.
        parts: indices of bags in each part, by name or in order.
        unit: what a group is called in the message.

    Raises:
        InputError: names every patient that straddles, and where.
    """
    groups = np.asarray(groups)
    named = parts if isinstance(parts, dict) else {str(i): part for i, part in enumerate(parts)}
    seen: dict[object, list[str]] = {}
    for name, indices in named.items():
        for patient in np.unique(groups[np.asarray(indices, dtype=np.int64)]).tolist():
            seen.setdefault(patient, []).append(name)
    problems = [
        f"{unit} {patient} is in {' and '.join(names)}"
        for patient, names in seen.items()
        if len(names) > 1
    ]
    raise_problems(
        f"this split leaks {unit}s, so its scores would be too good; put all bags of a {unit} in "
        "one part:",
        problems,
    )
