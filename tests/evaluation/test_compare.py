import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.evaluation.bootstrap import bootstrap_ci, bootstrap_draws
from cytoray.evaluation.compare import compare_all, compare_paired, holm


def make(seed=0, size=300, patients=100):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, patients, size)
    labels = rng.integers(0, 2, size)
    shared = rng.normal(size=size)
    return rng, labels, groups, shared


def squash(x):
    return 1 / (1 + np.exp(-x))


def test_a_better_encoder_is_found_and_the_difference_is_of_the_same_draws():
    rng, labels, groups, shared = make()
    good = squash(shared + 2.0 * labels)
    poor = squash(shared + 0.8 * labels + 0.5 * rng.normal(size=300))
    result = compare_paired(labels, good, poor, groups, n=500, names=("good", "poor"))
    draws = [bootstrap_draws(labels, s, groups, "auc", 500, 0) for s in (good, poor)]
    assert (result.low, result.high) == pytest.approx(
        tuple(np.percentile(draws[0] - draws[1], [2.5, 97.5]))
    )
    assert result.difference == pytest.approx(result.value_first - result.value_second)
    assert result.value_first == bootstrap_ci(labels, good, groups, n=10).point
    assert result.low > 0
    assert result.p_value == pytest.approx(2 / 501)
    swapped = compare_paired(labels, poor, good, groups, n=500)
    assert swapped.p_value == result.p_value
    assert (swapped.low, swapped.high) == pytest.approx((-result.high, -result.low))


def test_pairing_narrows_the_interval():
    rng, labels, groups, shared = make()
    first = squash(shared + labels)
    second = squash(shared + labels + 0.1 * rng.normal(size=300))
    result = compare_paired(labels, first, second, groups, n=500)
    alone = bootstrap_ci(labels, first, groups, n=500)
    assert result.high - result.low < 0.5 * (alone.high - alone.low)


def test_equal_scores_have_p_1_and_no_metric_has_none():
    _, labels, groups, shared = make()
    same = compare_paired(labels, squash(shared), squash(shared), groups, "accuracy", n=100)
    assert (same.difference, same.p_value, same.low, same.high) == (0.0, 1.0, 0.0, 0.0)
    one_class = compare_paired(np.ones(9, int), *[np.linspace(0, 1, 9)] * 2, np.arange(9), n=20)
    assert one_class.num_draws == 0
    assert np.isnan(one_class.p_value)


def test_p_values_of_no_difference_are_uniform_enough():
    small = 0
    for seed in range(120):
        rng, labels, groups, _ = make(seed, 120, 60)
        first, second = (squash(labels + rng.normal(size=120)) for _ in range(2))
        small += compare_paired(labels, first, second, groups, n=200, seed=seed).p_value < 0.1
    assert 3 <= small <= 24


def test_all_pairs_with_holms_correction():
    rng, labels, groups, shared = make()
    scores = {
        name: squash(shared + gain * labels + 0.3 * rng.normal(size=300))
        for name, gain in (("a", 2.0), ("b", 2.0), ("c", 0.2))
    }
    results = {(r.first, r.second): r for r in compare_all(labels, scores, groups, n=300)}
    assert set(results) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert results["a", "c"].p_adjusted < 0.05 < results["a", "b"].p_adjusted
    assert all(r.p_adjusted >= r.p_value for r in results.values())
    assert holm([0.01, 0.04, 0.03, float("nan")]) == pytest.approx(
        [0.03, 0.06, 0.06, float("nan")], nan_ok=True
    )
    with pytest.raises(InputError, match="at least two encoders"):
        compare_all(labels, {"a": scores["a"]}, groups)
    with pytest.raises(InputError, match="level"):
        compare_all(labels, scores, groups, level=95)
