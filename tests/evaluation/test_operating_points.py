from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve, roc_curve

from cytoray.evaluation import METRICS
from cytoray.evaluation.operating_points import (
    curves,
    mean_interval,
    operating_points,
    specificity_at_sensitivity,
)


@pytest.fixture
def scored():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 300)
    scores = np.clip(rng.normal(0.35 + 0.3 * labels, 0.2), 0, 1).round(2)
    return labels, scores, np.repeat(np.arange(100), 3)


def test_both_kinds_agree_with_the_roc_curve(scored) -> None:
    labels, scores, _ = scored
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    for level in (0.8, 0.9, 0.95):
        best = (1 - fpr)[tpr >= level - 1e-9].max()
        assert specificity_at_sensitivity(labels, scores, sensitivity=level) == pytest.approx(best)
        best = tpr[1 - fpr >= level - 1e-9].max()
        found = METRICS["sensitivity_at_specificity"](labels, scores, specificity=level)
        assert found == pytest.approx(best)


def test_points_have_intervals_and_names(scored) -> None:
    labels, scores, groups = scored
    table = np.stack([1 - scores, scores], axis=1)
    points = operating_points(labels, table, groups, ["no", "yes"], n=200)
    assert [(p.name, p.measure, p.at) for p in points] == [
        ("yes", "sensitivity", 0.9), ("yes", "specificity", 0.9),
        ("yes", "sensitivity", 0.95), ("yes", "specificity", 0.95),
    ]  # fmt: skip
    for point in points:
        assert point.interval.low <= point.interval.point <= point.interval.high
    three = np.stack([table[:, 0], table[:, 1] / 2, table[:, 1] / 2], axis=1)
    points = operating_points(labels, three, groups, ["a", "b", "c"], levels=(0.9,), n=20)
    assert [p.name for p in points] == ["a", "a", "b", "b", "c", "c"]


def test_curves_are_those_of_scikit_learn(scored) -> None:
    labels, scores, _ = scored
    found = curves(labels == 1, scores)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert found.fpr == pytest.approx(fpr)
    assert found.tpr == pytest.approx(tpr)
    precision, recall, _ = precision_recall_curve(labels, scores)
    assert found.precision == pytest.approx(precision[-2::-1])
    assert found.recall == pytest.approx(recall[-2::-1])


def test_mean_over_folds_is_student_s() -> None:
    low, high, mean = mean_interval([0.8, 0.9, 0.7, 0.8, float("nan")])
    assert mean == pytest.approx(0.8)
    assert (low, high) == (pytest.approx(0.6701, abs=1e-4), pytest.approx(0.9299, abs=1e-4))
    alone = mean_interval([0.5])
    assert alone.point == 0.5
    assert np.isnan(alone.low)
    assert np.isnan(mean_interval([]).point)
