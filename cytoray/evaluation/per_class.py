"""Tables of a classifier class by class: confusion matrix, per-class metrics, calibration curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cytoray.errors import InputError
from cytoray.evaluation.metrics import METRICS, predicted_classes


@dataclass(frozen=True)
class ClassMetrics:
    """One class against the rest; NaN where a metric is undefined.

    Attributes:
        name: of the class.
        support: bags of the class.
        precision, recall, specificity, f1: of the predicted class.
        auc, average_precision: of the class's probability.
    """

    name: str
    support: int
    precision: float
    recall: float
    specificity: float
    f1: float
    auc: float
    average_precision: float


@dataclass(frozen=True)
class CalibrationCurve:
    """Confidence against accuracy in bins of confidence; empty bins are left out.

    Attributes:
        confidence: (B,) mean confidence of a bin.
        accuracy: (B,) share that is right.
        count: (B,) bags.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def _checked(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """labels (N,) int64 in 0..C-1 and probabilities (N, C)."""
    METRICS["accuracy"](labels, scores)
    labels, scores = np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64)
    return labels, np.stack([1 - scores, scores], axis=1) if scores.ndim == 1 else scores


def confusion_matrix(labels, scores) -> np.ndarray:
    """How many bags of each class (row) were called each class (column): (C, C) int64.

    Args:
        labels: (N,) in 0..C-1.
        scores: (N, C) probabilities, or (N,) of class 1.

    Raises:
        InputError: labels and scores that do not fit.
    """
    labels, scores = _checked(labels, scores)
    count = scores.shape[1]
    pairs = labels * count + predicted_classes(scores)
    return np.bincount(pairs, minlength=count * count).reshape(count, count)


def per_class_metrics(labels, scores, names: Sequence[str] | None = None) -> list[ClassMetrics]:
    """Every class against the rest.

    Args:
        labels: (N,) in 0..C-1.
        scores: (N, C) probabilities, or (N,) of class 1.
        names: of the C classes; default: their numbers.

    Raises:
        InputError: labels and scores that do not fit, or another number of names.
    """
    labels, scores = _checked(labels, scores)
    count = scores.shape[1]
    names = [str(index) for index in range(count)] if names is None else list(names)
    if len(names) != count:
        raise InputError(f"{len(names)} class names for {count} classes")
    table = confusion_matrix(labels, scores)
    rows = []
    for index, name in enumerate(names):
        hits, actual, called = table[index, index], table[index].sum(), table[:, index].sum()
        others = len(labels) - actual
        one, probability = (labels == index).astype(np.int64), np.clip(scores[:, index], 0.0, 1.0)
        rows.append(
            ClassMetrics(
                name,
                int(actual),
                _share(hits, called),
                _share(hits, actual),
                _share(others - called + hits, others),
                _share(2 * hits, called + actual) if actual else float("nan"),
                float(METRICS["auc"](one, probability)),
                float(METRICS["average_precision"](one, probability)),
            )
        )
    return rows


def calibration_curve(labels, scores, bins: int = 15) -> CalibrationCurve:
    """Reliability of the confidence in the called class, in equal bins (those of `ece`).

    Args:
        labels: (N,) in 0..C-1.
        scores: (N, C) probabilities, or (N,) of class 1.
        bins: between 0 and 1.

    Raises:
        InputError: labels and scores that do not fit, or no bin.
    """
    if bins < 1:
        raise InputError(f"a calibration curve needs at least one bin, got {bins}")
    labels, scores = _checked(labels, scores)
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    used = count > 0
    means = (np.bincount(index, part, minlength=bins)[used] for part in (confidence, right))
    first, second = (total / count[used] for total in means)
    return CalibrationCurve(first, second, count[used])


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else float("nan")
