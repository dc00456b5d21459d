"""Few-shot curves: so many examples of each class, drawn over seeds, the test part held fixed.

Examples of one group (a patient, or the image that cells were cut from) look alike. The training
pool and the test part share no group, and the shots of a class come from as many groups as there
are: one of each group before a second of any.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from cytoray.errors import InputError, raise_problems
from cytoray.evaluation.metrics import CELL_METRICS, evaluate_scores
from cytoray.evaluation.probes import Labelled, run_probe
from cytoray.evaluation.splits import Split, check_no_leak

SHOTS = (1, 2, 4, 8, 16, 50)


@dataclass(frozen=True)
class FewShotRun:
    """One point of a curve.

    Attributes:
        probe: its name.
        shots: examples of each class.
        seed: of the draw.
        metrics: on the test part, by name.
    """

    probe: str
    shots: int
    seed: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class FewShotPoint:
    """A curve's point over the seeds.

    Attributes:
        probe, shots, metric: which.
        mean: over the seeds.
        low, high: 95 % t-interval of the mean over the seeds; NaN with one seed.
        num_seeds: seeds with a defined metric.
    """

    probe: str
    shots: int
    metric: str
    mean: float
    low: float
    high: float
    num_seeds: int


def draw_shots(
    labels: Sequence | np.ndarray, groups: Sequence | np.ndarray, shots: int, seed: int
) -> np.ndarray:
    """Draw `shots` examples of every class: (C * shots,) int64 indices, sorted.

    Groups are gone through in random order, one random example of each, then a second, and so on.
    With the same seed, fewer shots are a part of more shots.

    Args:
        labels: (N,) of the pool.
        groups: (N,) group of each example.
        shots: of each class.
        seed: of the draw.

    Raises:
        InputError: a class with fewer examples.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    if labels.shape != groups.shape or shots < 1:
        raise InputError(f"{len(labels)} labels, {len(groups)} groups and {shots} shots do not fit")
    classes, counts = np.unique(labels, return_counts=True)
    problems = [
        f"class {name} has {count} examples"
        for name, count in zip(classes.tolist(), counts.tolist(), strict=True)
        if count < shots
    ]
    raise_problems(f"{shots} shots cannot be drawn:", problems)
    chosen = []
    for position, name in enumerate(classes):
        rng = np.random.default_rng((seed, position))
        members = rng.permutation(np.flatnonzero(labels == name))
        _, group = np.unique(groups[members], return_inverse=True)
        place = rng.permutation(group.max() + 1)[group]
        rank = _rank_in_group(group)
        order = np.lexsort((place, rank))
        chosen.append(members[order[:shots]])
    return np.sort(np.concatenate(chosen))


def _rank_in_group(group: np.ndarray) -> np.ndarray:
    """How many of the same group stand before each: (N,) int64."""
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(group))[:-1]])
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - starts[group[order]]
    return rank


def draw_share(labels: Sequence | np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draw a share of every class, at least one example of each: indices, sorted.

    With the same seed, a smaller share is a part of a larger one.

    Raises:
        InputError: a share that is not above 0 and at most 1.
    """
    if not 0.0 < share <= 1.0:
        raise InputError(f"share {share} must be above 0 and at most 1")
    labels, chosen = np.asarray(labels), []
    for position, name in enumerate(np.unique(labels)):
        rng = np.random.default_rng((seed, position))
        members = rng.permutation(np.flatnonzero(labels == name))
        chosen.append(members[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(chosen))


def few_shot_runs(
    features: np.ndarray,
    labels: np.ndarray,
    groups: Sequence | np.ndarray,
    split: Split,
    *,
    probes: Sequence[str] = ("linear", "knn", "simple_shot"),
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = (0, 1, 2),
    metrics: Sequence[str] = CELL_METRICS,
    options: dict[str, dict[str, Any]] | None = None,
) -> list[FewShotRun]:
    """Train every probe on every draw of shots, and evaluate it on the test part.

    Shots are drawn from the training part; the validation part, where there is one, chooses what
    a probe has to choose (a probe's C, say), as the published protocol does.

    Args:
        features: (N, D).
        labels: (N,) int in 0..C-1.
        groups: (N,) patient or source image.
        split: of `train_val_test`; it is checked for leaks again.
        probes: names of `PROBES`.
        shots: examples of each class.
        seeds: of the draws.
        metrics: names of `METRICS`.
        options: of each probe, by its name.

    Raises:
        InputError: a group on both sides of the split, a class with too few examples to draw, or
            features that cannot be probed.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    check_no_leak(groups, split._asdict())
    num_classes = int(labels.max()) + 1
    pool_labels, pool_groups = labels[split.train], groups[split.train]
    val = Labelled(features[split.val], labels[split.val]) if len(split.val) else None
    runs = []
    for count, seed in itertools.product(shots, seeds):
        chosen = split.train[draw_shots(pool_labels, pool_groups, count, seed)]
        train = Labelled(features[chosen], labels[chosen])
        for probe in probes:
            extra = {"seed": seed} | (options or {}).get(probe, {})
            answer = run_probe(probe, train, val, features[split.test], num_classes, **extra)
            values = evaluate_scores(labels[split.test], answer.probabilities, metrics)
            runs.append(FewShotRun(probe, count, seed, values))
    return runs


def few_shot_curve(runs: Sequence[FewShotRun]) -> list[FewShotPoint]:
    """Mean and 95 % interval over the seeds, for every probe, number of shots and metric."""
    grouped: dict[tuple[str, int, str], list[float]] = {}
    for run in runs:
        for metric, value in run.metrics.items():
            grouped.setdefault((run.probe, run.shots, metric), []).append(value)
    return [FewShotPoint(*key, *mean_interval(values)) for key, values in grouped.items()]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean, the two ends of its 95 % t-interval, and how many values are defined."""
    defined = np.array([value for value in values if np.isfinite(value)])
    count = len(defined)
    if count == 0:
        return float("nan"), float("nan"), float("nan"), 0
    mean = float(defined.mean())
    if count == 1:
        return mean, float("nan"), float("nan"), 1
    half = float(stats.t.ppf(0.975, count - 1) * defined.std(ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half, count
