from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from cytoray.errors import InputError
from cytoray.evaluation import METRICS, train_val_test
from cytoray.evaluation.protocol import (
    MAP_POINTS,
    Examples,
    compare_encoders,
    embedding_map,
    few_shot_examples,
    map_places,
    probe_examples,
    score_answers,
)


@pytest.fixture(scope="module")
def examples() -> Examples:
    labels = np.tile(np.arange(3), 60)
    groups = np.array([f"{label}-{i // 9}" for i, label in enumerate(labels)])
    return Examples(
        names=tuple(map(str, range(180))),
        labels=labels,
        classes=("a", "b", "c"),
        groups=groups,
        split=train_val_test(labels, groups, (0.5, 0.2, 0.3)),
    )


def features(examples: Examples, noise: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.eye(3)[examples.labels] + noise * rng.normal(size=(180, 3))


def test_scores_agree_with_sklearn_and_lie_in_their_intervals(examples) -> None:
    answers, facts = probe_examples("linear", features(examples, 0.6), examples)
    assert facts["val_accuracy"] > 0.5
    scores = score_answers(answers, examples, n=200)
    truth, called = examples.labels[examples.split.test], answers.argmax(1)
    value, low, high = scores["metrics"]["accuracy"]
    assert value == pytest.approx(accuracy_score(truth, called))
    assert low < value < high
    macro = scores["metrics"]["macro_f1"][0]
    assert macro == pytest.approx(f1_score(truth, called, average="macro"))
    np.testing.assert_array_equal(scores["confusion"], confusion_matrix(truth, called))
    assert [row["name"] for row in scores["per_class"]] == ["a", "b", "c"]


def test_macro_f1_of_two_classes_is_a_mean_and_f1_is_not() -> None:
    labels, scores = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.9, 0.8, 0.3])
    called = (scores >= 0.5).astype(int)
    expected = f1_score(labels, called, average="macro")
    assert METRICS["macro_f1"](labels, scores) == pytest.approx(expected)
    assert METRICS["f1"](labels, scores) == pytest.approx(f1_score(labels, called))


def test_encoders_are_compared_per_probe_with_holm_over_all(examples) -> None:
    good = probe_examples("linear", features(examples, 0.3), examples)[0]
    bad = probe_examples("linear", features(examples, 3.0), examples)[0]
    answers = {("good", "linear"): good, ("bad", "linear"): bad, ("same", "linear"): good,
               ("good", "knn"): good, ("bad", "knn"): bad, ("alone", "two_layer"): bad}  # fmt: skip
    rows = compare_encoders(answers, examples, n=200)
    assert [(r["probe"], r["first"], r["second"]) for r in rows] == [
        ("linear", "good", "bad"), ("linear", "good", "same"), ("linear", "bad", "same"),
        ("knn", "good", "bad"),
    ]  # fmt: skip
    assert rows[0]["difference"] > 0.2
    assert rows[0]["p_value"] < 0.02
    assert (rows[1]["difference"], rows[1]["p_value"]) == (0, 1)
    assert all(r["p_adjusted"] >= r["p_value"] for r in rows)
    assert rows[0]["p_adjusted"] == pytest.approx(min(1, 4 * rows[0]["p_value"]), rel=0.5)


def test_few_shot_rows(examples) -> None:
    rows = few_shot_examples(
        features(examples, 0.2), examples, probes=("knn",), shots=(1, 4), seeds=(0, 1)
    )
    assert [(r["shots"], r["seed"]) for r in rows] == [(1, 0), (1, 1), (4, 0), (4, 1)]
    assert {"accuracy", "macro_f1"} <= set(rows[0]["metrics"])


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_maps_keep_classes_apart_and_hang_on_the_seed(examples, method: str) -> None:
    wide = np.concatenate([features(examples, 0.05), np.ones((180, 1))], axis=1)
    points = embedding_map(wide[:60], method)
    assert points.shape == (60, 2)
    assert np.isfinite(points).all()
    near = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(60)
    assert (examples.labels[near.argmin(1)] == examples.labels[:60]).mean() > 0.9
    np.testing.assert_array_equal(points, embedding_map(wide[:60], method))
    with pytest.raises(InputError, match="unknown map 'umap'; valid: pca, tsne"):
        embedding_map(wide, "umap")


def test_a_map_draws_test_examples_at_most_so_many(examples) -> None:
    places = map_places(examples.split)
    assert set(places.tolist()) == set(examples.split.test.tolist())
    many = examples.split._replace(test=np.arange(10 * MAP_POINTS))
    assert len(set(map_places(many).tolist())) == MAP_POINTS
