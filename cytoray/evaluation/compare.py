"""Is one encoder better than another? Paired differences under the same bootstrap draws."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cytoray.errors import InputError
from cytoray.evaluation.bootstrap import bootstrap_draws, metric_of
from cytoray.evaluation.metrics import Metric
from cytoray.evaluation.weights import Weights


@dataclass(frozen=True)
class Comparison:
    """Two sets of scores for the same bags.

    Attributes:
        first, second: names.
        value_first, value_second: the metric of each on the data as they are.
        difference: first minus second.
        low, high: percentile interval of the difference.
        p_value: two-sided, of no difference.
        p_adjusted: after Holm's correction over all comparisons made together.
        num_draws: draws in which the metric is defined for both.
    """

    first: str
    second: str
    value_first: float
    value_second: float
    difference: float
    low: float
    high: float
    p_value: float
    p_adjusted: float
    num_draws: int


def compare_paired(
    y: np.ndarray,
    scores_first: np.ndarray,
    scores_second: np.ndarray,
    groups: np.ndarray,
    metric: str | Metric = "auc",
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    names: tuple[str, str] = ("first", "second"),
) -> Comparison:
    """Compare two sets of scores for the same bags by a paired bootstrap over patients.

    Both are evaluated on the same draws, so that what makes a draw easy cancels. The p-value is
    twice the smaller share of draws at or beyond no difference, (1 + count) / (1 + draws) each.

    Args:
        y: (N,) labels.
        scores_first, scores_second: (N,) or (N, C).
        groups: (N,) patient of each bag.
        metric: a name of `METRICS`, or a function (labels, scores, weights (N, K)) -> (K,).
        n: draws.
        seed: of the draws.
        level: coverage of the interval.
        names: of the two.

    Raises:
        InputError: an unknown metric, lengths that differ, or a level outside 0..1.
    """
    if not 0.0 < level < 1.0 or n < 1:
        raise InputError(f"a bootstrap needs n >= 1 and 0 < level < 1, got n {n}, level {level}")
    draws, values = [], []
    for scores in (scores_first, scores_second):
        once = Weights(np.ones((1, len(np.asarray(y)))))
        draws.append(bootstrap_draws(y, scores, groups, metric, n, seed))
        values.append(float(np.asarray(metric_of(metric, np.asarray(y), scores, once))[0]))
    gaps = draws[0] - draws[1]
    gaps = gaps[np.isfinite(gaps)]
    low, high, p_value = float("nan"), float("nan"), float("nan")
    if len(gaps):
        tail = 50.0 * (1.0 - level)
        low, high = np.percentile(gaps, [tail, 100.0 - tail]).tolist()
        beyond = min(int((gaps <= 0).sum()), int((gaps >= 0).sum()))
        p_value = min(1.0, 2.0 * (1 + beyond) / (1 + len(gaps)))
    return Comparison(
        first=names[0],
        second=names[1],
        value_first=values[0],
        value_second=values[1],
        difference=values[0] - values[1],
        low=low,
        high=high,
        p_value=p_value,
        p_adjusted=p_value,
        num_draws=len(gaps),
    )


def compare_all(
    y: np.ndarray,
    scores: Mapping[str, np.ndarray],
    groups: np.ndarray,
    metric: str | Metric = "auc",
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Comparison]:
    """Compare every pair of several encoders; `p_adjusted` holds over all pairs (Holm).

    Args:
        y: (N,) labels.
        scores: (N,) or (N, C) by the encoder's name, at least two.
        groups: (N,) patient of each bag.
        metric: see `compare_paired`.
        n: draws.
        seed: of the draws.
        level: coverage of the intervals.

    Raises:
        InputError: fewer than two encoders; see also `compare_paired`.
    """
    if len(scores) < 2:
        raise InputError(f"a comparison needs at least two encoders, got {len(scores)}")
    results = [
        compare_paired(
            y,
            scores[first],
            scores[second],
            groups,
            metric,
            n=n,
            seed=seed,
            level=level,
            names=(first, second),
        )
        for first, second in itertools.combinations(scores, 2)
    ]
    adjusted = holm([result.p_value for result in results])
    return [replace(r, p_adjusted=p) for r, p in zip(results, adjusted, strict=True)]


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction; NaN stays NaN and counts for nothing."""
    order = sorted((p, index) for index, p in enumerate(p_values) if np.isfinite(p))
    adjusted, largest = [float("nan")] * len(p_values), 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted
