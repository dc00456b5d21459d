import numpy as np
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from cytoray.errors import InputError
from cytoray.evaluation.bootstrap import bootstrap_ci, bootstrap_draws, draw_counts


def make(patients=40, size=120, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, size)
    scores = 1 / (1 + np.exp(-(rng.normal(size=size) + labels)))
    groups = np.array([f"p{i}" for i in rng.integers(0, patients, size)])
    return labels, scores.round(2), groups


def plain_loop(labels, scores, groups, metric, n, seed):
    """One draw after another, bags of the drawn patients laid end to end."""
    names = np.unique(groups)
    bags = [np.flatnonzero(groups == name) for name in names]
    values = []
    for counts in draw_counts(len(names), n, seed):
        for row in counts:
            drawn = np.concatenate([np.tile(b, c) for b, c in zip(bags, row, strict=True)])
            values.append(metric(labels[drawn], scores[drawn]))
    return np.array(values)


def test_equals_a_plain_loop_with_equal_draws():
    labels, scores, groups = make()
    expected = plain_loop(labels, scores, groups, roc_auc_score, 130, 3)
    got = bootstrap_draws(labels, scores, groups, "auc", 130, 3)
    assert np.abs(got - expected).max() < 1e-12
    called = plain_loop(labels, scores >= 0.5, groups, accuracy_score, 130, 3)
    got = bootstrap_draws(labels, scores, groups, "accuracy", 130, 3)
    assert np.abs(got - called).max() < 1e-12


def test_interval_is_the_percentiles_of_the_draws():
    labels, scores, groups = make()
    draws = bootstrap_draws(labels, scores, groups, "auc", 400, 1)
    interval = bootstrap_ci(labels, scores, groups, "auc", n=400, seed=1, level=0.9)
    low, high, point = interval
    assert (low, high) == pytest.approx(tuple(np.percentile(draws, [5, 95])))
    assert point == pytest.approx(roc_auc_score(labels, scores))
    assert low < point < high
    assert interval == bootstrap_ci(labels, scores, groups, "auc", n=400, seed=1, level=0.9)
    assert interval != bootstrap_ci(labels, scores, groups, "auc", n=400, seed=2, level=0.9)


def test_draws_take_whole_patients_as_many_as_there_are():
    blocks = list(draw_counts(7, 120, 0))
    counts = np.concatenate(blocks)
    assert counts.shape == (120, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert abs(counts.mean(axis=0) - 1).max() < 0.35


def test_clusters_widen_the_interval():
    """Ten copies of each bag bring no information: by patient the width stays as it was."""
    labels, scores, _ = make(size=100)
    patients = np.arange(100)
    copies = np.repeat(patients, 10)

    def width(labels, scores, groups):
        low, high, _ = bootstrap_ci(labels, scores, groups, "auc", n=500)
        return high - low

    once = width(labels, scores, patients)
    assert width(labels[copies], scores[copies], copies) == pytest.approx(once)
    assert width(labels[copies], scores[copies], np.arange(1000)) < 0.5 * once


def test_coverage_is_near_the_level():
    """Accuracy of a coin with bias 0.7: the 95 % interval covers 0.7 about 95 times in 100."""
    rng, covered = np.random.default_rng(0), 0
    for seed in range(150):
        labels = np.ones(80, dtype=int)
        scores = (rng.random(80) < 0.7).astype(float)
        low, high, _ = bootstrap_ci(labels, scores, np.arange(80), "accuracy", n=300, seed=seed)
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_own_metric_and_undefined_draws():
    labels, scores, groups = make()

    def prevalence(labels, scores, weights):
        return labels @ weights / weights.sum(axis=0)

    low, high, point = bootstrap_ci(labels, scores, groups, prevalence, n=200)
    assert low < point == labels.mean() < high
    one_class = bootstrap_ci(np.ones(5, int), np.linspace(0, 1, 5), np.arange(5), "auc", n=20)
    assert np.isnan(one_class).all()
    rare = np.array([1] + [0] * 9)
    draws = bootstrap_draws(rare, np.linspace(0, 1, 10), np.arange(10), "auc", 200)
    assert 0 < np.isnan(draws).sum() < 200
    assert np.isfinite(bootstrap_ci(rare, np.linspace(0, 1, 10), np.arange(10), n=200)).all()


def test_bad_input_is_said():
    labels, scores, groups = make()
    with pytest.raises(InputError, match="one patient a bag"):
        bootstrap_ci(labels, scores, groups[:-1])
    with pytest.raises(InputError, match="unknown metric 'roc'"):
        bootstrap_ci(labels, scores, groups, "roc")
    with pytest.raises(InputError, match="level"):
        bootstrap_ci(labels, scores, groups, level=95)
