import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from cytoray.errors import InputError
from cytoray.evaluation.probes import PROBES, Labelled, run_probe


def make(size=150, num_classes=3, width=12, seed=0, spread=1.6):
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(99).normal(size=(num_classes, width)) * spread
    labels = np.arange(size) % num_classes
    features = (means[labels] + rng.normal(size=(size, width))).astype(np.float32)
    return Labelled(features, labels)


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_every_probe_tells_separable_classes_apart(name, num_classes):
    train, val, test = (make(n, num_classes, seed=s) for s, n in enumerate((160, 60, 100)))
    options = {"lr": 3e-3, "epochs": 20, "hidden_dim": 64} if name == "two_layer" else {}
    result = run_probe(name, train, val, test.features, num_classes, **options)
    assert result.probabilities.shape == (100, num_classes)
    assert np.allclose(result.probabilities.sum(axis=1), 1.0)
    assert (result.probabilities.argmax(1) == test.labels).mean() > 0.93
    again = run_probe(name, train, val, test.features, num_classes, **options)
    assert np.array_equal(result.probabilities, again.probabilities)


def test_knn_equals_scikit_learn_on_unit_vectors():
    train, test = make(80), make(40, seed=1)
    unit = [x.features / np.linalg.norm(x.features, axis=1, keepdims=True) for x in (train, test)]

    def votes(distances):
        return np.exp((1 - distances**2 / 2) / 0.1)

    reference = KNeighborsClassifier(7, weights=votes).fit(unit[0], train.labels)
    mine = run_probe("knn", train, None, test.features, 3, k=7, temperature=0.1)
    assert np.allclose(mine.probabilities, reference.predict_proba(unit[1]), atol=1e-4)
    assert run_probe("knn", train, None, test.features, 3, k=500).facts == {"k": 80.0}


def test_simple_shot_by_hand():
    train = Labelled(np.array([[2.0, 0], [4, 0], [0, 2], [0, 4]]), np.array([0, 0, 1, 1]))
    result = run_probe("simple_shot", train, None, np.array([[9.0, 1], [1, 9], [1.5, 1.5]]), 2)

    def unit(row):
        moved = np.array(row) - 1.5
        return moved / np.linalg.norm(moved)

    means = [(unit([2, 0]) + unit([4, 0])) / 2, (unit([0, 2]) + unit([0, 4])) / 2]
    gap = [((unit([9, 1]) - mean) ** 2).sum() for mean in means]
    expected = np.exp(-gap[0]) / (np.exp(-gap[0]) + np.exp(-gap[1]))
    assert result.probabilities[0, 0] == pytest.approx(expected, abs=1e-6)
    assert result.probabilities[1, 0] == pytest.approx(1 - expected, abs=1e-6)
    assert result.probabilities[2].tolist() == pytest.approx([0.5, 0.5])


def test_linear_probe_chooses_c_on_the_validation_part():
    train, val, test = make(60, spread=0.5), make(200, seed=1, spread=0.5), make(50, seed=2)
    grid = (1e-4, 1e-2, 1.0, 100.0)
    scaler = StandardScaler().fit(train.features)
    accuracies, answers = [], []
    for c in grid:
        model = LogisticRegression(C=c, max_iter=2000)
        model.fit(scaler.transform(train.features), train.labels)
        accuracies.append(model.score(scaler.transform(val.features), val.labels))
        answers.append(model.predict_proba(scaler.transform(test.features)))
    result = run_probe("linear", train, val, test.features, 3, c_grid=grid)
    assert result.facts["val_accuracy"] == pytest.approx(max(accuracies), abs=0.011)
    chosen = grid.index(result.facts["c"])
    assert np.abs(result.probabilities - answers[chosen]).max() < 0.02
    assert run_probe("linear", train, None, test.features, 3).facts == {"c": 1.0}


def test_balanced_linear_probe_raises_the_rare_class():
    labels = np.array([0] * 190 + [1] * 10)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 4)) + 1.5 * labels[:, None] * [1, 0, 0, 0]
    queries = rng.normal(size=(100, 4)) + np.array([1.5, 0, 0, 0])
    recall = [
        run_probe("linear", Labelled(features, labels), None, queries, 2, balanced=balanced)
        .probabilities[:, 1]
        .mean()
        for balanced in (False, True)
    ]
    assert recall[1] > recall[0] + 0.2


def test_two_layer_probe_stops_early_and_keeps_the_best_epoch():
    train, val = make(64, spread=0.4), make(60, seed=1, spread=0.4)
    options = {"lr": 3e-2, "epochs": 30, "hidden_dim": 16, "patience": 2}
    result = run_probe("two_layer", train, val, val.features, 3, **options)
    accuracy = (result.probabilities.argmax(1) == val.labels).mean()
    assert accuracy == pytest.approx(result.facts["val_accuracy"])
    assert 1 <= result.facts["epoch"] < 30
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    run_probe("two_layer", train, None, val.features, 3, epochs=1)
    assert torch.equal(before, torch.rand(1))


def test_problems_are_all_said():
    train, val, test = make(), make(seed=1), make(20, seed=2)
    bad = Labelled(val.features[:, :5], val.labels)
    lacking = Labelled(train.features, np.zeros(len(train.labels), int))
    spoilt = test.features.copy()
    spoilt[3, 0] = np.nan
    with pytest.raises(InputError) as error:
        run_probe("linear", lacking, bad, spoilt, 3)
    assert len(error.value.problems) == 3
    text = str(error.value)
    assert "1 of the test features are NaN" in text
    assert "validation features have shape (150, 5), expected (N >= 1, 12)" in text
    assert "missing: [1, 2]" in text
    with pytest.raises(InputError, match="valid: knn, linear, simple_shot, two_layer"):
        run_probe("svm", train, None, test.features, 3)
    with pytest.raises(InputError, match=r"whole numbers in 0\.\.1"):
        run_probe("knn", train, None, test.features, 2)


def test_the_linear_probe_converges_on_correlated_features_of_an_encoders_width() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 2000)
    turn = np.linalg.qr(rng.normal(size=(192, 192)))[0]
    means = 0.1 * rng.normal(size=(4, 192))
    values = (rng.normal(size=(2000, 192)) + means[labels]) / np.arange(1, 193) ** 1.5
    features = (values @ turn).astype(np.float32)
    train, val = Labelled(features[200:], labels[200:]), Labelled(features[:200], labels[:200])
    few = run_probe("linear", train, val, features, 4, c_grid=(10.0,), max_iterations=500)
    assert few.facts["unconverged"] == 500, "or the features are too easy to show anything"
    assert "unconverged" not in run_probe("linear", train, val, features, 4, c_grid=(10.0,)).facts


@pytest.mark.parametrize("chosen_on", ["validation", "nothing"])
def test_a_fit_that_stops_short_says_so_without_a_warning_of_the_library(chosen_on) -> None:
    train, test = make(), make(60, seed=1)
    val = test if chosen_on == "validation" else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = run_probe("linear", train, val, test.features, 3, max_iterations=1)
        whole = run_probe("linear", train, val, test.features, 3)
    assert short.facts["unconverged"] == 1.0
    assert "unconverged" not in whole.facts
