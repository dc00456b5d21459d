import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.evaluation import weights as module
from cytoray.evaluation.metrics import METRICS
from cytoray.evaluation.weights import Weights

RNG = np.random.default_rng(0)
COUNTS = RNG.integers(0, 4, (30, 7))
PATIENT = RNG.integers(0, 7, 50)


def test_by_patient_equals_the_table_laid_out():
    by_patient, table = Weights(COUNTS, PATIENT), COUNTS.T[PATIENT]
    laid_out = Weights.of(table, 50)
    values = RNG.normal(size=(3, 50))
    assert by_patient.num_bags == laid_out.num_bags == 50
    assert np.allclose(by_patient.sums(values), values @ table)
    assert np.allclose(by_patient.sums(values[0]), laid_out.sums(values[0]))
    assert np.array_equal(by_patient.total, table.sum(axis=0))
    index = RNG.permutation(50)[:20]
    assert np.array_equal(by_patient.of_bags(index), table[index].T)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_every_metric_takes_either_form_in_blocks_of_any_size(num_classes, monkeypatch):
    labels = RNG.integers(0, num_classes, 50)
    scores = RNG.dirichlet(np.ones(num_classes), 50).round(2)
    for name, metric in METRICS.items():
        expected = metric(labels, scores, COUNTS.T[PATIENT])
        for values in (1, 170, 10**6):
            monkeypatch.setattr(module, "BLOCK_VALUES", values)
            mine = metric(labels, scores, Weights(COUNTS, PATIENT))
            assert np.allclose(mine, expected, atol=1e-12, equal_nan=True), name
            assert mine.shape == (30,)


def test_another_number_of_bags_is_said():
    with pytest.raises(InputError, match="weights of 4 bags for 3 labels"):
        METRICS["auc"]([0, 1, 1], [0.1, 0.2, 0.3], np.ones((4, 2)))
