"""Classification metrics in one form: plain, or for many weightings of the same bags at once.

Every function takes

- `labels` (N,) integers in 0..C-1 (1 is the positive class when C = 2);
- `scores` (N,) probability of class 1, or (N, C) probabilities;
- `weights` None, or (N, K): how much each bag counts in each of K weightings (for a bootstrap,
  how often it was drawn);

and returns a float, or (K,) float64 with NaN where the metric is undefined (a class is missing).
Of three classes or more, ranking and per-class metrics are macro averages, one class against the
rest, over the classes that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import numpy as np

from cytoray.errors import InputError, choose

Metric = Callable[..., "float | np.ndarray"]
_OneVsRest = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _checked(labels, scores, weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """labels (N,) int64, scores (N, C) float64, weights (N, K) float64."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if scores.ndim == 1:
        scores = np.stack([1.0 - scores, scores], axis=1)
    if labels.ndim != 1 or scores.ndim != 2 or len(labels) != len(scores) or len(labels) == 0:
        raise InputError(
            f"labels {labels.shape} and scores {scores.shape} do not fit: expected (N,) and (N,) "
            "or (N, C) with N >= 1"
        )
    if not np.isfinite(scores).all():
        raise InputError(f"{int((~np.isfinite(scores)).any(axis=1).sum())} scores are not finite")
    if not np.isin(labels, np.arange(scores.shape[1])).all():
        raise InputError(f"labels must be whole numbers in 0..{scores.shape[1] - 1}")
    if weights is None:
        weights = np.ones((len(labels), 1))
    return labels.astype(np.int64), scores, np.asarray(weights, dtype=np.float64)


def _metric(function: Callable[..., np.ndarray]) -> Metric:
    """Check the input of a weighted metric, and give a float where no weights are given."""

    @wraps(function)
    def checked(labels, scores, weights=None, **options) -> float | np.ndarray:
        values = function(*_checked(labels, scores, weights), **options)
        return float(values[0]) if weights is None else values

    return checked


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0."""
    out = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


def _macro(one_vs_rest: _OneVsRest, labels, scores, weights) -> np.ndarray:
    """Binary metric of class 1; with more classes, its mean over the classes that are there."""
    if scores.shape[1] == 2:
        return one_vs_rest(labels == 1, scores[:, 1], weights)
    classes = [
        one_vs_rest(labels == index, scores[:, index], weights)
        for index in range(scores.shape[1])
        if (labels == index).any()
    ]
    return _mean_over_classes(np.stack(classes))


def _mean_over_classes(values_ck: np.ndarray) -> np.ndarray:
    there = np.isfinite(values_ck)
    return _ratio(np.where(there, values_ck, 0.0).sum(axis=0), there.sum(axis=0).astype(float))


def _binary_auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """P(positive scores above negative) + P(tie) / 2, by weighted ranks (Mann-Whitney)."""
    negatives, positives = np.flatnonzero(~positive), np.flatnonzero(positive)
    negatives = negatives[np.argsort(score[negatives], kind="stable")]
    positives = positives[np.argsort(score[positives], kind="stable")]
    below = np.zeros((len(negatives) + 1, weights.shape[1]))
    np.cumsum(np.take(weights, negatives, axis=0), axis=0, out=below[1:])
    first = np.searchsorted(score[negatives], score[positives], side="left")
    last = np.searchsorted(score[negatives], score[positives], side="right")
    weights_pos = np.take(weights, positives, axis=0)
    wins = np.einsum("pk,pk->k", weights_pos, np.take(below, first, axis=0))
    tied = first != last
    if tied.any():
        ties = below[last[tied]] - below[first[tied]]
        wins += 0.5 * np.einsum("pk,pk->k", weights_pos[tied], ties)
    return _ratio(wins, weights_pos.sum(axis=0) * below[-1])


def _curve(positive: np.ndarray, score: np.ndarray, weights: np.ndarray):
    """True and false positives (U, K) when the threshold is each distinct score, falling."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    ordered = np.take(weights, order, axis=0)
    true_positives = np.cumsum(ordered * positive[order, None], axis=0)[ends]
    return true_positives, np.cumsum(ordered, axis=0)[ends] - true_positives


def _binary_average_precision(positive, score, weights) -> np.ndarray:
    true_positives, false_positives = _curve(positive, score, weights)
    precision = _ratio(true_positives, true_positives + false_positives)
    gained = np.diff(true_positives, axis=0, prepend=0.0)
    area = np.where(gained > 0, gained * np.nan_to_num(precision), 0.0).sum(axis=0)
    return _ratio(area, true_positives[-1])


@_metric
def auc(labels, scores, weights) -> np.ndarray:
    """Area under the ROC curve, ties counted half; macro one-vs-rest for C > 2."""
    return _macro(_binary_auc, labels, scores, weights)


@_metric
def average_precision(labels, scores, weights) -> np.ndarray:
    """Average precision (sum of precision times recall gained); macro one-vs-rest for C > 2."""
    return _macro(_binary_average_precision, labels, scores, weights)


@_metric
def sensitivity_at_specificity(labels, scores, weights, *, specificity=0.9) -> np.ndarray:
    """Highest sensitivity of a threshold whose specificity is at least `specificity`."""

    def one_vs_rest(positive, score, weights):
        true_positives, false_positives = _curve(positive, score, weights)
        negatives = false_positives[-1]
        allowed = false_positives <= (1.0 - specificity) * negatives + 1e-9 * np.maximum(
            negatives, 1.0
        )
        best = np.where(allowed, true_positives, 0.0).max(axis=0)
        return np.where(negatives > 0, _ratio(best, true_positives[-1]), np.nan)

    return _macro(one_vs_rest, labels, scores, weights)


def _confusion(labels, scores, weights):
    """Per class (C, K): true positives, predicted positives, actual positives; total (K,)."""
    classes = np.arange(scores.shape[1])[:, None]
    predicted = scores.argmax(axis=1)
    if scores.shape[1] == 2:
        predicted = (scores[:, 1] >= 0.5).astype(np.int64)
    is_label, is_predicted = labels == classes, predicted == classes
    parts = (is_label & is_predicted, is_predicted, is_label)
    return *(part.astype(np.float64) @ weights for part in parts), weights.sum(axis=0)


def _class_one_or_macro(values_ck: np.ndarray) -> np.ndarray:
    return values_ck[1] if len(values_ck) == 2 else _mean_over_classes(values_ck)


@_metric
def accuracy(labels, scores, weights) -> np.ndarray:
    """Share of bags whose predicted class is right (class 1 from 0.5 on when C = 2)."""
    hits, _, _, total = _confusion(labels, scores, weights)
    return _ratio(hits.sum(axis=0), total)


@_metric
def balanced_accuracy(labels, scores, weights) -> np.ndarray:
    """Mean recall over the classes that are there."""
    hits, _, actual, _ = _confusion(labels, scores, weights)
    return _mean_over_classes(_ratio(hits, actual))


@_metric
def sensitivity(labels, scores, weights) -> np.ndarray:
    """Recall of class 1; macro recall for C > 2."""
    hits, _, actual, _ = _confusion(labels, scores, weights)
    return _class_one_or_macro(_ratio(hits, actual))


@_metric
def specificity(labels, scores, weights) -> np.ndarray:
    """Share of class 0 called class 0; macro one-vs-rest for C > 2."""
    hits, predicted, actual, total = _confusion(labels, scores, weights)
    true_negatives = total - predicted - actual + hits
    return _class_one_or_macro(_ratio(true_negatives, total - actual))


@_metric
def f1(labels, scores, weights) -> np.ndarray:
    """F1 of class 1; macro over the classes that are there for C > 2."""
    hits, predicted, actual, _ = _confusion(labels, scores, weights)
    values = np.where(actual > 0, _ratio(2.0 * hits, predicted + actual), np.nan)
    return _class_one_or_macro(values)


@_metric
def brier(labels, scores, weights) -> np.ndarray:
    """Mean squared error of the probabilities: of class 1 when C = 2, summed over classes else."""
    errors = (scores - np.eye(scores.shape[1])[labels]) ** 2
    error = errors[:, 1] if scores.shape[1] == 2 else errors.sum(axis=1)
    return _ratio(error @ weights, weights.sum(axis=0))


@_metric
def expected_calibration_error(labels, scores, weights, *, bins=15) -> np.ndarray:
    """Mean gap between confidence and accuracy over `bins` equal bins of top-label confidence."""
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    in_bin = (index == np.arange(bins)[:, None]).astype(np.float64)
    gaps = np.abs((in_bin * (right - confidence)) @ weights).sum(axis=0)
    return _ratio(gaps, weights.sum(axis=0))


METRICS: dict[str, Metric] = {
    "auc": auc,
    "average_precision": average_precision,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "sensitivity": sensitivity,
    "recall": sensitivity,
    "specificity": specificity,
    "f1": f1,
    "sensitivity_at_specificity": sensitivity_at_specificity,
    "brier": brier,
    "ece": expected_calibration_error,
}
DEFAULT_METRICS = tuple(name for name in METRICS if name != "recall")


def evaluate_scores(labels, scores, names=DEFAULT_METRICS) -> dict[str, float]:
    """Several metrics by name; NaN where one is undefined on these labels.

    Raises:
        InputError: an unknown name, or labels and scores that do not fit.
    """
    chosen = {name: METRICS[choose("metric", name, METRICS)] for name in names}
    return {name: float(metric(labels, scores)) for name, metric in chosen.items()}
