"""Everything a paper reports of one task's held-out answers, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cytoray.evaluation.bootstrap import Interval, bootstrap_ci, draw_counts
from cytoray.evaluation.calibration import reliability
from cytoray.evaluation.metrics import METRICS
from cytoray.evaluation.operating_points import curves, mean_interval, operating_points
from cytoray.evaluation.per_class import confusion_matrix, per_class_metrics
from cytoray.evaluation.weights import Weights

REPORTED = ("auc", "average_precision", "accuracy", "balanced_accuracy", "sensitivity",
            "specificity", "f1", "brier", "ece")  # fmt: skip
_MAX_CORNERS = 400


def assess(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    names: Sequence[str],
    *,
    folds: np.ndarray | None = None,
    n: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics with intervals by patient, operating points, calibration, confusion and curves.

    Args:
        labels: (N,) in 0..C-1, all known.
        probabilities: (N, C).
        groups: (N,) patient of each slide.
        names: of the C classes.
        folds: (N,) the fold each slide was held out in; None: one.
        n: bootstrap draws.
        seed: of the draws.

    Returns:
        `num`, `num_groups`, `classes`, `metrics` (name -> point, low, high), `over_folds` (name ->
        mean, low, high, values; with several folds), `operating_points`, `confusion`, `per_class`,
        and by class `curves` and `reliability`.
    """
    metrics = {}
    for name in REPORTED:
        interval = bootstrap_ci(labels, probabilities, groups, name, n, seed)
        metrics[name] = {"point": interval.point, "low": interval.low, "high": interval.high}
    drawn, reliable = {}, {}
    for index in [1] if len(names) == 2 else range(len(names)):
        positive, score = labels == index, np.clip(probabilities[:, index], 0.0, 1.0)
        drawn[names[index]] = {
            key: _thinned(value) for key, value in asdict(curves(positive, score)).items()
        }
        reliable[names[index]] = {
            key: value.tolist() for key, value in asdict(reliability(positive, score)).items()
        }
    return {
        "num": len(labels),
        "num_groups": len(np.unique(groups)),
        "classes": list(names),
        "metrics": metrics,
        "over_folds": _over_folds(labels, probabilities, folds),
        "operating_points": [
            {
                "class": point.name,
                "measure": point.measure,
                "fixed": point.fixed,
                "at": point.at,
                "point": point.interval.point,
                "low": point.interval.low,
                "high": point.interval.high,
            }
            for point in operating_points(labels, probabilities, groups, names, n=n, seed=seed)
        ],
        "confusion": confusion_matrix(labels, probabilities).tolist(),
        "per_class": [asdict(row) for row in per_class_metrics(labels, probabilities, names)],
        "curves": drawn,
        "reliability": reliable,
    }


def mean_auc(
    tasks: Sequence[tuple[np.ndarray, np.ndarray]], groups: np.ndarray, n: int = 1000, seed: int = 0
) -> Interval:
    """AUC, averaged over tasks, with its interval by patient.

    Args:
        tasks: labels (N,), -1 where missing, and probabilities (N, C) of each task.
        groups: (N,) patient of each slide.
        n: bootstrap draws.
        seed: of the draws.
    """
    if len(tasks) == 1 and (tasks[0][0] >= 0).all():
        return bootstrap_ci(*tasks[0], groups, "auc", n, seed)
    names, group_of_slide = np.unique(groups, return_inverse=True)

    def averaged(counts: np.ndarray) -> np.ndarray:
        columns = []
        for labels, probabilities in tasks:
            known = labels >= 0
            weights = Weights(counts, group_of_slide[known])
            columns.append(METRICS["auc"](labels[known], probabilities[known], weights))
        table = np.stack(columns)
        return np.where(np.isfinite(table).all(axis=0), table.mean(axis=0), np.nan)

    point = float(averaged(np.ones((1, len(names))))[0])
    draws = np.concatenate([averaged(counts) for counts in draw_counts(len(names), n, seed)])
    defined = draws[np.isfinite(draws)]
    if not len(defined):
        return Interval(float("nan"), float("nan"), point)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(float(low), float(high), point)


def _over_folds(
    labels: np.ndarray, probabilities: np.ndarray, folds: np.ndarray | None
) -> dict[str, Any]:
    """Each metric's mean over the folds, where there are several."""
    names = [] if folds is None else list(dict.fromkeys(folds.tolist()))
    if len(names) < 2:
        return {}
    made = {}
    for name in REPORTED:
        values = [
            float(METRICS[name](labels[folds == fold], probabilities[folds == fold]))
            for fold in names
        ]
        interval = mean_interval(values, bounds=(0.0, 2.0 if name == "brier" else 1.0))
        made[name] = {"mean": interval.point, "low": interval.low, "high": interval.high,
                      "values": values}  # fmt: skip
    return made


def _thinned(values: np.ndarray) -> list[float]:
    """At most a few hundred corners, first and last kept."""
    if len(values) > _MAX_CORNERS:
        values = values[np.linspace(0, len(values) - 1, _MAX_CORNERS).round().astype(int)]
    return np.round(values, 5).tolist()
