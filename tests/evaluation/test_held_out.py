from __future__ import annotations

import numpy as np
import pytest

from cytoray.evaluation import METRICS, bootstrap_ci
from cytoray.evaluation.held_out import assess, mean_auc


def answers(classes: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 90)
    logits = rng.normal(size=(90, classes)) + 1.5 * np.eye(classes)[labels]
    table = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, table, np.repeat(np.arange(45), 2)


@pytest.mark.parametrize("classes", [2, 3])
def test_everything_of_a_task(classes: int) -> None:
    labels, table, groups = answers(classes)
    names = list("abc"[:classes])
    folds = np.repeat(["fold0", "fold1", "fold2"], 30)
    found = assess(labels, table, groups, names, folds=folds, n=100)
    auc = bootstrap_ci(labels, table, groups, "auc", 100)
    assert found["metrics"]["auc"] == {"point": auc.point, "low": auc.low, "high": auc.high}
    assert (found["num"], found["num_groups"]) == (90, 45)
    assert np.sum(found["confusion"]) == 90
    over = found["over_folds"]["auc"]
    each = [METRICS["auc"](labels[folds == f], table[folds == f]) for f in np.unique(folds)]
    assert over["values"] == pytest.approx(each)
    assert over["mean"] == pytest.approx(np.mean(each))
    shown = names[1:] if classes == 2 else names
    assert list(found["curves"]) == list(found["reliability"]) == shown
    assert len(found["operating_points"]) == 4 * len(shown)
    assert assess(labels, table, groups, names, n=10)["over_folds"] == {}


def test_the_mean_over_tasks_leaves_out_missing_labels() -> None:
    labels, table, groups = answers(2)
    second, other, _ = answers(3, seed=1)
    second[:40] = -1
    found = mean_auc([(labels, table), (second, other)], groups, n=200)
    known = second >= 0
    points = METRICS["auc"](labels, table), METRICS["auc"](second[known], other[known])
    assert found.point == pytest.approx(np.mean(points))
    assert found.low < found.point < found.high
    alone = mean_auc([(labels, table)], groups, n=50)
    assert alone == bootstrap_ci(labels, table, groups, "auc", 50)
