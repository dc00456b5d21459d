"""Confidence intervals by resampling patients, all draws at once.

A draw takes as many patients as there are, with replacement, and all bags of each; it is kept as
the number of times each patient was drawn, so that a metric of many draws is one weighted metric.
Shapes: N bags, G patients, K draws of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cytoray.errors import InputError, choose
from cytoray.evaluation.metrics import METRICS, Metric
from cytoray.evaluation.weights import Weights

CHUNK_VALUES = 5_000_000


class Interval(NamedTuple):
    """A confidence interval and the metric on the data as they are."""

    low: float
    high: float
    point: float


def draw_counts(num_groups: int, n: int, seed: int) -> Iterator[np.ndarray]:
    """Draw patients with replacement, `n` times.

    Args:
        num_groups: G.
        n: draws.
        seed: the same seed gives the same draws.

    Yields:
        (K, G) int64, rows summing to G: how often each patient was drawn.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_VALUES // num_groups)
    for start in range(0, n, chunk):
        draws = min(chunk, n - start)
        counts = np.empty((draws, num_groups), dtype=np.int64)
        for row in counts:
            row[:] = np.bincount(rng.integers(0, num_groups, num_groups), minlength=num_groups)
        yield counts


def bootstrap_draws(
    y: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    metric: str | Metric,
    n: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """The metric of every draw: (n,) float64, NaN where a draw misses a class it needs.

    Args:
        y: (N,) labels.
        scores: (N,) or (N, C).
        groups: (N,) patient of each bag, of any type.
        metric: a name of `METRICS`, or a function (labels, scores, weights (N, K)) -> (K,).
        n: draws.
        seed: of the draws.

    Raises:
        InputError: an unknown metric, or lengths that differ.
    """
    y, groups = np.asarray(y), np.asarray(groups)
    if groups.shape != y.shape:
        raise InputError(f"{len(groups)} patients for {len(y)} bags: give one patient a bag")
    names, group_of_bag = np.unique(groups, return_inverse=True)
    return np.concatenate(
        [
            np.asarray(metric_of(metric, y, scores, Weights(counts, group_of_bag)))
            for counts in draw_counts(len(names), n, seed)
        ]
    )


def bootstrap_ci(
    y: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    metric: str | Metric = "auc",
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a metric, resampled by patient.

    Draws in which the metric is undefined are left out; with none left the bounds are NaN.

    Args:
        y: (N,) labels.
        scores: (N,) or (N, C).
        groups: (N,) patient of each bag.
        metric: a name of `METRICS`, or a function (labels, scores, weights (N, K)) -> (K,).
        n: draws.
        seed: of the draws.
        level: coverage, between 0 and 1.

    Returns:
        (low, high, point).

    Raises:
        InputError: an unknown metric, lengths that differ, or a level outside 0..1.
    """
    if not 0.0 < level < 1.0 or n < 1:
        raise InputError(f"a bootstrap needs n >= 1 and 0 < level < 1, got n {n}, level {level}")
    draws = bootstrap_draws(y, scores, groups, metric, n, seed)
    defined = draws[np.isfinite(draws)]
    once = Weights(np.ones((1, len(np.asarray(y)))))
    point = float(np.asarray(metric_of(metric, y, scores, once))[0])
    if not len(defined):
        return Interval(float("nan"), float("nan"), point)
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(defined, [tail, 100.0 - tail])
    return Interval(float(low), float(high), point)


def metric_of(metric: str | Metric, y: np.ndarray, scores: np.ndarray, weights: Weights):
    """A metric by name, or the user's own function with its weights (N, K), for each draw: (K,).

    Raises:
        InputError: an unknown name.
    """
    if isinstance(metric, str):
        return METRICS[choose("metric", metric, METRICS)](y, scores, weights)
    return metric(y, scores, weights.of_bags(np.arange(weights.num_bags)).T)
