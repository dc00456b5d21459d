import numpy as np
import pytest
import sklearn.metrics as sk

from cytoray.errors import InputError
from cytoray.evaluation.metrics import METRICS
from cytoray.evaluation.per_class import calibration_curve, confusion_matrix, per_class_metrics

from .test_metrics import make


@pytest.mark.parametrize("num_classes", [2, 4])
def test_equal_scikit_learn(num_classes):
    labels, scores = make(num_classes)
    called = scores.argmax(1) if num_classes > 2 else (scores[:, 1] >= 0.5).astype(int)
    assert np.array_equal(confusion_matrix(labels, scores), sk.confusion_matrix(labels, called))
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels, called)
    rows = per_class_metrics(labels, scores, names=[f"class {i}" for i in range(num_classes)])
    for index, row in enumerate(rows):
        one = labels == index
        assert row.name == f"class {index}"
        assert row.support == support[index]
        assert row.precision == pytest.approx(precision[index])
        assert row.recall == pytest.approx(recall[index])
        assert row.f1 == pytest.approx(f1[index])
        assert row.specificity == pytest.approx(np.mean(called[~one] != index))
        assert row.auc == pytest.approx(sk.roc_auc_score(one, scores[:, index]))
        expected = sk.average_precision_score(one, scores[:, index])
        assert row.average_precision == pytest.approx(expected)


def test_macro_means_are_those_of_the_metrics():
    labels, scores = make(4)
    rows = per_class_metrics(labels, scores)
    for name, field in (("sensitivity", "recall"), ("f1", "f1"), ("auc", "auc")):
        mean = np.mean([getattr(row, field) for row in rows])
        assert METRICS[name](labels, scores) == pytest.approx(mean)


def test_absent_classes_are_nan():
    labels, scores = make(4)
    row = per_class_metrics(labels[labels != 3], scores[labels != 3])[3]
    assert row.support == 0
    assert np.isnan([row.recall, row.f1, row.auc]).all()
    assert row.precision == 0.0


def test_calibration_curve_gives_the_calibration_error():
    labels, scores = make(4)
    curve = calibration_curve(labels, scores)
    assert curve.count.sum() == 200
    gap = (curve.count * np.abs(curve.confidence - curve.accuracy)).sum() / 200
    assert gap == pytest.approx(METRICS["ece"](labels, scores))
    sure = calibration_curve([1, 1, 0, 1], [0.9, 0.92, 0.95, 0.1], bins=10)
    assert sure.count.tolist() == [2, 2]
    assert sure.accuracy.tolist() == [0.5, 0.5]
    assert sure.confidence.tolist() == pytest.approx([0.9, 0.935])


def test_what_does_not_fit_is_said():
    with pytest.raises(InputError, match="2 class names for 3 classes"):
        per_class_metrics([0, 1, 2], np.eye(3), names=["a", "b"])
    with pytest.raises(InputError, match="do not fit"):
        confusion_matrix([0, 1], [0.5])
    with pytest.raises(InputError, match="at least one bin"):
        calibration_curve([0, 1], [0.1, 0.9], bins=0)
