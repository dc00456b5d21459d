"""From a sample of slides to all of them, with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

DRAWS = 2000
_TAIL = 0.025


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval; the ends are None when one slide is all there is."""

    value: float
    low: float | None = None
    high: float | None = None

    def scaled(self, factor: float) -> Interval:
        """The same in another unit; `factor` is above 0."""
        ends = (None if end is None else end * factor for end in (self.low, self.high))
        low, high = ends
        return Interval(value=self.value * factor, low=low, high=high)


def estimate(
    columns: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    population: int,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval:
    """A figure of the whole cohort from the means over a sample of slides.

    The interval is the expanded percentile bootstrap over slides (Hesterberg 2015): percentiles of
    resampled figures, taken wider as Student's t is than the normal distribution, since a dozen
    slides show too little of their spread. It is drawn in towards the estimate by the finite
    population correction sqrt(1 - n / N): a sample of all slides leaves nothing to doubt.

    Args:
        columns: float (n, k), k quantities of each sampled slide.
        statistic: means (B, k) -> figures (B,); NaN where means say nothing.
        population: N, slides of the cohort.
        seed: of the resampling.
        draws: resamples.
    """
    count = len(columns)
    value = float(statistic(columns.mean(axis=0, keepdims=True))[0])
    if count >= population:
        return Interval(value=value, low=value, high=value)
    if count < 2:
        return Interval(value=value)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=draws) / count
    drawn = statistic(weights @ columns)
    wider = math.sqrt(count / (count - 1)) * stats.t.ppf(_TAIL, count - 1)
    tail = float(stats.norm.cdf(wider))
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    shrink = math.sqrt(1 - count / population)
    return Interval(
        value=value,
        low=min(value, value + (float(low) - value) * shrink),
        high=max(value, value + (float(high) - value) * shrink),
    )


def share_interval(hits: int, count: int) -> Interval:
    """A share of slides with its exact (Clopper and Pearson) 95 % interval."""
    low = 0.0 if hits == 0 else float(stats.beta.ppf(_TAIL, hits, count - hits + 1))
    high = 1.0 if hits == count else float(stats.beta.ppf(1 - _TAIL, hits + 1, count - hits))
    return Interval(value=hits / count, low=low, high=high)
