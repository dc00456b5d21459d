import numpy as np
import pytest
from scipy import stats

from cytoray.errors import InputError
from cytoray.evaluation.few_shot import (
    FewShotRun,
    draw_share,
    draw_shots,
    few_shot_curve,
    few_shot_runs,
)
from cytoray.evaluation.splits import Split, train_val_test


def make(size=300, num_classes=3, seed=0):
    """Cells of 60 images, one class an image, classes of different size."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, size)
    labels = np.array([0, 1, 1, 2, 2, 2])[image % 6]
    means = rng.normal(size=(num_classes, 8)) * 1.5
    features = (means[labels] + rng.normal(size=(size, 8))).astype(np.float32)
    return features, labels, np.array([f"image {i}" for i in image])


@pytest.mark.parametrize("shots", [1, 4, 16])
def test_so_many_of_each_class_from_as_many_groups_as_possible(shots):
    _, labels, groups = make()
    chosen = draw_shots(labels, groups, shots, seed=3)
    assert np.bincount(labels[chosen]).tolist() == [shots] * 3
    assert len(set(chosen.tolist())) == 3 * shots
    for name in range(3):
        mine = groups[chosen[labels[chosen] == name]]
        available = len(np.unique(groups[labels == name]))
        _, repeats = np.unique(mine, return_counts=True)
        assert len(repeats) == min(shots, available)
        assert repeats.max() - repeats.min() <= 1


def test_seeds_decide_and_fewer_shots_are_a_part_of_more():
    _, labels, groups = make()
    few, more = draw_shots(labels, groups, 2, 5), draw_shots(labels, groups, 8, 5)
    assert set(few.tolist()) < set(more.tolist())
    assert np.array_equal(few, draw_shots(labels, groups, 2, 5))
    assert not np.array_equal(few, draw_shots(labels, groups, 2, 6))


def test_a_class_too_small_is_named():
    with pytest.raises(InputError, match="class b has 1 examples"):
        draw_shots(["a", "a", "b"], [0, 1, 2], 2, 0)


def test_shares_of_every_class():
    _, labels, _ = make()
    counts = np.bincount(labels)
    tenth, half = draw_share(labels, 0.1, 1), draw_share(labels, 0.5, 1)
    assert np.bincount(labels[tenth]).tolist() == [max(1, round(0.1 * n)) for n in counts]
    assert set(tenth.tolist()) < set(half.tolist())
    assert len(draw_share(labels, 1.0, 1)) == len(labels)
    assert np.bincount(labels[draw_share(labels, 1e-6, 0)]).tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="at most 1"):
        draw_share(labels, 5, 0)


def test_curves_rise_and_shots_never_come_from_the_test_part():
    features, labels, groups = make()
    split = train_val_test(labels, groups, (0.6, 0.1, 0.3), seed=0)
    runs = few_shot_runs(
        features, labels, groups, split, probes=("linear", "simple_shot"), shots=(1, 8)
    )
    assert len(runs) == 2 * 3 * 2
    assert {run.seed for run in runs} == {0, 1, 2}
    points = {(p.probe, p.shots): p for p in few_shot_curve(runs) if p.metric == "accuracy"}
    for probe in ("linear", "simple_shot"):
        assert points[probe, 8].mean > points[probe, 1].mean
        assert points[probe, 8].mean > 0.85
    spoilt = features.copy()
    spoilt[split.test] = np.random.default_rng(0).normal(size=(len(split.test), 8))
    noise = few_shot_runs(spoilt, labels, groups, split, probes=("simple_shot",), shots=(8,))
    assert max(run.metrics["accuracy"] for run in noise) < 0.7


def test_leaks_are_refused():
    features, labels, groups = make()
    with pytest.raises(InputError, match="leaks patients"):
        few_shot_runs(
            features,
            labels,
            groups,
            Split(np.arange(200), np.arange(0), np.arange(200, 300)),
            shots=(1,),
        )


def test_a_point_is_the_mean_and_t_interval_over_seeds():
    values = [0.7, 0.8, 0.75]
    runs = [FewShotRun("knn", 4, seed, {"auc": v}) for seed, v in enumerate(values)]
    runs.append(FewShotRun("knn", 4, 3, {"auc": float("nan")}))
    (point,) = few_shot_curve(runs)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (point.mean, point.low, point.high) == pytest.approx((np.mean(values), low, high))
    assert point.num_seeds == 3
    (alone,) = few_shot_curve(runs[:1])
    assert alone.mean == 0.7
    assert np.isnan(alone.low)
