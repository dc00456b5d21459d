import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics.functional.classification as tm

from cytoray.errors import InputError
from cytoray.evaluation.metrics import METRICS, evaluate_scores


def make(num_classes, size=200, seed=0, ties=True):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, size)
    logits = rng.normal(size=(size, num_classes)) + 1.2 * np.eye(num_classes)[labels]
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if ties and num_classes == 2:
        scores = np.stack([1 - scores[:, 1].round(1), scores[:, 1].round(1)], 1)
    return labels, scores


def specificity_by_hand(labels, predicted, classes):
    values = [np.mean(predicted[labels != c] != c) for c in (classes if len(classes) > 2 else [1])]
    return float(np.mean(values))


def references(labels, scores, weight=None):
    """From scikit-learn, by sample weight."""
    classes = np.arange(scores.shape[1])
    binary = len(classes) == 2
    predicted = (scores[:, 1] >= 0.5).astype(int) if binary else scores.argmax(1)
    average = {"average": "binary"} if binary else {"average": "macro"}
    one_hot = np.eye(len(classes))[labels]
    out = {
        "accuracy": sk.accuracy_score(labels, predicted, sample_weight=weight),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted, sample_weight=weight),
        "sensitivity": sk.recall_score(labels, predicted, sample_weight=weight, **average),
        "f1": sk.f1_score(labels, predicted, sample_weight=weight, **average),
    }
    if binary:
        out["auc"] = sk.roc_auc_score(labels, scores[:, 1], sample_weight=weight)
        out["average_precision"] = sk.average_precision_score(
            labels, scores[:, 1], sample_weight=weight
        )
        out["brier"] = sk.brier_score_loss(labels, scores[:, 1], sample_weight=weight)
    else:
        columns = [(one_hot[:, c], scores[:, c]) for c in classes]
        out["auc"] = np.mean([sk.roc_auc_score(*c, sample_weight=weight) for c in columns])
        precisions = [sk.average_precision_score(*c, sample_weight=weight) for c in columns]
        out["average_precision"] = np.mean(precisions)
        errors = ((scores - one_hot) ** 2).sum(1)
        out["brier"] = np.average(errors, weights=weight)
    return out


@pytest.mark.parametrize("num_classes", [2, 4])
def test_equal_scikit_learn(num_classes):
    labels, scores = make(num_classes)
    mine = evaluate_scores(labels, scores)
    for name, value in references(labels, scores).items():
        assert mine[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("num_classes", [2, 4])
def test_weighted_columns_equal_scikit_learns_sample_weight(num_classes):
    labels, scores = make(num_classes)
    weights = np.random.default_rng(1).integers(0, 4, (200, 5)).astype(float)
    for column in range(5):
        expected = references(labels, scores, weights[:, column])
        for name, value in expected.items():
            mine = METRICS[name](labels, scores, weights)
            assert mine.shape == (5,)
            assert mine[column] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("num_classes", [2, 4])
def test_every_weighted_metric_equals_repeating_the_bags(num_classes):
    labels, scores = make(num_classes)
    counts = np.random.default_rng(2).integers(0, 3, 200)
    repeated = np.repeat(np.arange(200), counts)
    for name, metric in METRICS.items():
        weighted = metric(labels, scores, counts[:, None].astype(float))[0]
        assert weighted == pytest.approx(metric(labels[repeated], scores[repeated]), abs=1e-12), (
            name
        )


@pytest.mark.parametrize("num_classes", [2, 4])
def test_specificity_and_calibration(num_classes):
    labels, scores = make(num_classes, ties=False)
    predicted = scores.argmax(1)
    mine = evaluate_scores(labels, scores)
    by_hand = specificity_by_hand(labels, predicted, np.arange(num_classes))
    assert mine["specificity"] == pytest.approx(by_hand)
    expected = tm.multiclass_calibration_error(
        torch.from_numpy(scores), torch.from_numpy(labels), num_classes, n_bins=15
    )
    assert mine["ece"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95, 1.0])
def test_sensitivity_at_specificity_is_the_best_threshold(target):
    labels, scores = make(2)
    best = 0.0
    for threshold in [*np.unique(scores[:, 1]), 2.0]:
        called = scores[:, 1] >= threshold
        if (~called[labels == 0]).mean() >= target - 1e-12:
            best = max(best, called[labels == 1].mean())
    mine = METRICS["sensitivity_at_specificity"](labels, scores, specificity=target)
    assert mine == pytest.approx(best)


def test_one_column_means_the_probability_of_class_1():
    labels, scores = make(2)
    assert evaluate_scores(labels, scores) == evaluate_scores(labels, scores[:, 1])


def test_undefined_is_nan_and_absent_classes_are_left_out():
    one_class = evaluate_scores([1, 1], [0.2, 0.9])
    assert np.isnan([one_class[n] for n in ("auc", "specificity")]).all()
    assert one_class["sensitivity"] == 0.5
    labels, scores = make(4)
    kept = labels != 3
    three = scores[kept]
    expected = np.mean([sk.roc_auc_score(labels[kept] == c, three[:, c]) for c in range(3)])
    assert METRICS["auc"](labels[kept], three) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "scores", "match"),
    [
        ([0, 1, 1], [0.1, 0.2], "do not fit"),
        ([], [], "do not fit"),
        ([0, 2], [0.1, 0.2], "whole numbers in 0..1"),
        ([0, 1], [0.1, np.nan], "1 scores are not finite"),
    ],
)
def test_bad_input_is_said(labels, scores, match):
    with pytest.raises(InputError, match=match):
        evaluate_scores(labels, scores)
    with pytest.raises(InputError, match="valid: accuracy, auc"):
        evaluate_scores([0, 1], [0.1, 0.2], names=("AUROC",))
