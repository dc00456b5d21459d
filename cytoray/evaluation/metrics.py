"""Classification metrics in one form: plain, or for many weightings of the same bags at once.

Every function takes

- `labels` (N,) integers in 0..C-1 (1 is the positive class when C = 2);
- `scores` (N,) probability of class 1, or (N, C) probabilities;
- `weights` None, or (N, K), or `Weights`: how much each bag counts in each of K weightings (for a
  bootstrap, how often it was drawn);

and returns a float, or (K,) float64 with NaN where the metric is undefined (a class is missing).
Of three classes or more, ranking and per-class metrics are macro averages, one class against the
rest, over the classes that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps

import numpy as np

from cytoray.errors import InputError, choose
from cytoray.evaluation.weights import Weights

Metric = Callable[..., "float | np.ndarray"]
_Evaluate = Callable[[Weights], np.ndarray]
_OneVsRest = Callable[[np.ndarray, np.ndarray], _Evaluate]


def _checked(labels, scores, weights) -> tuple[np.ndarray, np.ndarray, Weights]:
    """labels (N,) int64, scores (N, C) float64, weights."""
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
    return labels.astype(np.int64), scores, Weights.of(weights, len(labels))


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


def _macro(one_vs_rest: _OneVsRest, labels, scores, weights: Weights) -> np.ndarray:
    """Binary metric of class 1; with more classes, its mean over the classes that are there.

    `one_vs_rest` sorts a class once; what it gives is called for block after block of weightings.
    """
    count = scores.shape[1]
    there = [1] if count == 2 else [index for index in range(count) if (labels == index).any()]
    values = []
    for index in there:
        evaluate = one_vs_rest(labels == index, scores[:, index])
        values.append(np.concatenate([evaluate(block) for block in weights.blocks()]))
    return values[0] if count == 2 else _mean_over_classes(np.stack(values))


def _mean_over_classes(values_ck: np.ndarray) -> np.ndarray:
    there = np.isfinite(values_ck)
    return _ratio(np.where(there, values_ck, 0.0).sum(axis=0), there.sum(axis=0).astype(float))


def _binary_auc(positive: np.ndarray, score: np.ndarray) -> _Evaluate:
    """P(positive scores above negative) + P(tie) / 2, by weighted ranks (Mann-Whitney)."""
    negatives, positives = np.flatnonzero(~positive), np.flatnonzero(positive)
    negatives = negatives[np.argsort(score[negatives], kind="stable")]
    positives = positives[np.argsort(score[positives], kind="stable")]
    first = np.searchsorted(score[negatives], score[positives], side="left")
    last = np.searchsorted(score[negatives], score[positives], side="right")
    tied = np.flatnonzero(first != last)

    def evaluate(weights: Weights) -> np.ndarray:
        shape = (len(weights.counts), len(negatives) + 1)
        below = np.zeros(shape, dtype=weights.counts.dtype)
        np.cumsum(weights.of_bags(negatives), axis=1, out=below[:, 1:])
        weights_pos = weights.of_bags(positives)
        wins = np.einsum("kp,kp->k", weights_pos, np.take(below, first, axis=1))
        if len(tied):
            ties = np.take(below, last[tied], axis=1) - np.take(below, first[tied], axis=1)
            wins = wins + 0.5 * np.einsum("kp,kp->k", np.take(weights_pos, tied, axis=1), ties)
        return _ratio(wins, weights_pos.sum(axis=1) * below[:, -1])

    return evaluate


def _curve(positive: np.ndarray, score: np.ndarray) -> Callable[[Weights], tuple]:
    """True and false positives (K, U) when the threshold is each distinct score, falling."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)

    def evaluate(weights: Weights) -> tuple[np.ndarray, np.ndarray]:
        ordered = weights.of_bags(order)
        called = np.take(np.cumsum(ordered, axis=1), ends, axis=1)
        ordered *= positive[order]
        true_positives = np.take(np.cumsum(ordered, axis=1), ends, axis=1)
        return true_positives, called - true_positives

    return evaluate


def _binary_average_precision(positive: np.ndarray, score: np.ndarray) -> _Evaluate:
    curve = _curve(positive, score)

    def evaluate(weights: Weights) -> np.ndarray:
        true_positives, false_positives = curve(weights)
        precision = _ratio(true_positives, true_positives + false_positives)
        gained = np.diff(true_positives, axis=1, prepend=0.0)
        area = np.where(gained > 0, gained * np.nan_to_num(precision), 0.0).sum(axis=1)
        return _ratio(area, true_positives[:, -1])

    return evaluate


def _binary_sensitivity_at(
    specificity: float, positive: np.ndarray, score: np.ndarray
) -> _Evaluate:
    curve = _curve(positive, score)

    def evaluate(weights: Weights) -> np.ndarray:
        true_positives, false_positives = curve(weights)
        negatives = false_positives[:, -1:]
        slack = 1e-9 * np.maximum(negatives, 1.0)
        allowed = false_positives <= (1.0 - specificity) * negatives + slack
        best = np.where(allowed, true_positives, 0.0).max(axis=1)
        return np.where(negatives[:, 0] > 0, _ratio(best, true_positives[:, -1]), np.nan)

    return evaluate


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
    return _macro(partial(_binary_sensitivity_at, specificity), labels, scores, weights)


def predicted_classes(scores: np.ndarray) -> np.ndarray:
    """The most probable class; with two classes, class 1 from 0.5 on: (N, C) to (N,)."""
    if scores.shape[1] == 2:
        return (scores[:, 1] >= 0.5).astype(np.int64)
    return scores.argmax(axis=1)


def _confusion(labels, scores, weights):
    """Per class (C, K): true positives, predicted positives, actual positives; total (K,)."""
    classes = np.arange(scores.shape[1])[:, None]
    predicted = predicted_classes(scores)
    is_label, is_predicted = labels == classes, predicted == classes
    parts = (is_label & is_predicted, is_predicted, is_label)
    return *(weights.sums(part) for part in parts), weights.total


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
def macro_f1(labels, scores, weights) -> np.ndarray:
    """Mean F1 over the classes that are there, also when C = 2."""
    hits, predicted, actual, _ = _confusion(labels, scores, weights)
    return _mean_over_classes(np.where(actual > 0, _ratio(2.0 * hits, predicted + actual), np.nan))


@_metric
def brier(labels, scores, weights) -> np.ndarray:
    """Mean squared error of the probabilities: of class 1 when C = 2, summed over classes else."""
    errors = (scores - np.eye(scores.shape[1])[labels]) ** 2
    error = errors[:, 1] if scores.shape[1] == 2 else errors.sum(axis=1)
    return _ratio(weights.sums(error), weights.total)


@_metric
def expected_calibration_error(labels, scores, weights, *, bins=15) -> np.ndarray:
    """Mean gap between confidence and accuracy over `bins` equal bins of top-label confidence."""
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    in_bin = (index == np.arange(bins)[:, None]).astype(np.float64)
    gaps = np.abs(weights.sums(in_bin * (right - confidence))).sum(axis=0)
    return _ratio(gaps, weights.total)


METRICS: dict[str, Metric] = {
    "auc": auc,
    "average_precision": average_precision,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "sensitivity": sensitivity,
    "recall": sensitivity,
    "specificity": specificity,
    "f1": f1,
    "macro_f1": macro_f1,
    "sensitivity_at_specificity": sensitivity_at_specificity,
    "brier": brier,
    "ece": expected_calibration_error,
}
DEFAULT_METRICS = tuple(name for name in METRICS if name not in ("recall", "macro_f1"))
CELL_METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc")


def evaluate_scores(labels, scores, names=DEFAULT_METRICS) -> dict[str, float]:
    """Several metrics by name; NaN where one is undefined on these labels.

    Raises:
        InputError: an unknown name, or labels and scores that do not fit.
    """
    chosen = {name: METRICS[choose("metric", name, METRICS)] for name in names}
    return {name: float(metric(labels, scores)) for name, metric in chosen.items()}
