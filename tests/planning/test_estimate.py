from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cytoray.planning import Interval, estimate, share_interval


def total(population: int):
    return lambda means: means[:, 0] * population


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Slides of uneven size, a dozen of them drawn 300 times."""
    rng = np.random.default_rng(0)
    slides = rng.gamma(3.0, 100.0, 2000)
    covered = []
    for seed in range(300):
        sample = rng.choice(slides, 12, replace=False)[:, None]
        found = estimate(sample, total(2000), population=2000, seed=seed, draws=400)
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.value <= found.high
        covered.append(found.low <= slides.sum() <= found.high)
    assert 0.89 < np.mean(covered) < 0.99


def test_all_slides_leave_no_doubt_and_one_gives_no_interval() -> None:
    columns = np.array([[1.0], [2.0], [6.0]])
    assert estimate(columns, total(3), population=3) == Interval(value=9.0, low=9.0, high=9.0)
    assert estimate(columns[:1], total(5), population=5) == Interval(value=5.0)
    wide = estimate(columns, total(1000), population=1000)
    near = estimate(columns, total(4), population=4)
    assert wide.low is not None
    assert near.low is not None
    assert (near.value - near.low) / near.value == pytest.approx(
        (wide.value - wide.low) / wide.value * np.sqrt(1 - 3 / 4) / np.sqrt(1 - 3 / 1000)
    )


def test_the_interval_of_a_normal_sample_is_near_students() -> None:
    sample = np.random.default_rng(1).normal(100, 10, 20)[:, None]
    found = estimate(sample, total(1), population=10**9, draws=20_000)
    half = stats.t.ppf(0.975, 19) * sample.std(ddof=1) / np.sqrt(20)
    assert found.high == pytest.approx(sample.mean() + half, abs=0.1 * half)
    assert found.low == pytest.approx(sample.mean() - half, abs=0.1 * half)


def test_shares() -> None:
    """Clopper and Pearson's own kind of table: 0 of 10 and 1 of 10."""
    none = share_interval(0, 10)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(0.3085, abs=1e-4)
    one = share_interval(1, 10)
    assert one.low == pytest.approx(0.0025, abs=1e-4)
    assert one.high == pytest.approx(0.4450, abs=1e-4)
    assert share_interval(10, 10).high == 1.0
