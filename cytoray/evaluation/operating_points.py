"""Where to put the threshold: sensitivity at a fixed specificity and the other way round, curves,
and means over folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats

from cytoray.evaluation.bootstrap import Interval, bootstrap_ci
from cytoray.evaluation.metrics import METRICS

LEVELS = (0.90, 0.95)


@dataclass(frozen=True)
class OperatingPoint:
    """What one class reaches, one against the rest, at a threshold that fixes the other rate.

    Attributes:
        name: of the class.
        measure: `sensitivity` or `specificity`.
        fixed: the other one.
        at: its least value.
        interval: low, high, point; by patient bootstrap.
    """

    name: str
    measure: str
    fixed: str
    at: float
    interval: Interval


def specificity_at_sensitivity(labels, scores, weights=None, *, sensitivity=0.9):
    """Highest specificity of a threshold whose sensitivity is at least `sensitivity`.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) probability of class 1.
        weights: None, or (N, K).
        sensitivity: to keep.

    Returns:
        A float, or (K,) with weights.
    """
    turned = 1 - np.asarray(labels), 1.0 - np.asarray(scores, dtype=np.float64)
    return METRICS["sensitivity_at_specificity"](*turned, weights, specificity=sensitivity)


def operating_points(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    names: Sequence[str],
    *,
    levels: Sequence[float] = LEVELS,
    n: int = 1000,
    seed: int = 0,
) -> list[OperatingPoint]:
    """Both kinds at every level, for class 1 of two, or for each of more classes.

    Args:
        labels: (N,) in 0..C-1.
        probabilities: (N, C).
        groups: (N,) patient of each bag.
        names: of the classes.
        levels: of the fixed rate.
        n: bootstrap draws.
        seed: of the draws.
    """
    points = []
    for index in [1] if len(names) == 2 else range(len(names)):
        binary = (labels == index).astype(np.int64), np.clip(probabilities[:, index], 0.0, 1.0)
        for level in levels:
            kinds = {
                "sensitivity": partial(METRICS["sensitivity_at_specificity"], specificity=level),
                "specificity": partial(specificity_at_sensitivity, sensitivity=level),
            }
            for measure, metric in kinds.items():
                fixed = "specificity" if measure == "sensitivity" else "sensitivity"
                interval = bootstrap_ci(*binary, groups, metric, n, seed)
                points.append(OperatingPoint(names[index], measure, fixed, level, interval))
    return points


@dataclass(frozen=True)
class Curves:
    """Corners of the ROC and precision-recall curves of one class; ties are one step.

    Attributes:
        fpr, tpr: (U,) from (0, 0) to (1, 1).
        recall, precision: (V,) recall rising, from the highest threshold.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    recall: np.ndarray
    precision: np.ndarray


def curves(positive: np.ndarray, score: np.ndarray) -> Curves:
    """ROC and precision-recall of one class against the rest.

    Args:
        positive: (N,) bool.
        score: (N,), higher is more positive.
    """
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    hits = np.cumsum(np.asarray(positive, bool)[order])[ends]
    called = ends + 1
    positives, negatives = max(hits[-1], 1), max(len(score) - hits[-1], 1)
    return Curves(
        np.concatenate([[0.0], (called - hits) / negatives]),
        np.concatenate([[0.0], hits / positives]),
        hits / positives,
        hits / called,
    )


def mean_interval(
    values: Sequence[float], level: float = 0.95, bounds: tuple[float, float] = (0.0, 1.0)
) -> Interval:
    """Mean over folds with Student's interval; NaN values are left out.

    The folds share training slides, so the interval is a little too narrow.

    Args:
        values: one a fold.
        level: coverage.
        bounds: of the metric; the interval does not go beyond.

    Returns:
        (low, high, mean); bounds are NaN with fewer than two values.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return Interval(float("nan"), float("nan"), float("nan"))
    mean = float(known.mean())
    if len(known) < 2:
        return Interval(float("nan"), float("nan"), mean)
    half = float(
        stats.t.ppf(0.5 + level / 2, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5
    )
    return Interval(max(mean - half, bounds[0]), min(mean + half, bounds[1]), mean)
