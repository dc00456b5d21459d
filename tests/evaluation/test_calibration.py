from __future__ import annotations

import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.evaluation.calibration import (
    fit_temperature,
    reliability,
    scaled_probabilities,
    wilson,
)


def overconfident(temperature: float, seed: int = 0):
    """Labels drawn from softmax(logits), and the logits made too sharp."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4000, 3))
    drawn = scaled_probabilities(logits, 1.0).cumsum(axis=1) > rng.random((4000, 1))
    return drawn.argmax(axis=1), logits * temperature


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_temperature_that_was_applied_is_found(temperature: float) -> None:
    labels, logits = overconfident(temperature)
    found = fit_temperature(labels, logits)
    assert found == pytest.approx(temperature, rel=0.1)
    scaled = scaled_probabilities(logits, found)
    assert np.array_equal(scaled.argmax(axis=1), logits.argmax(axis=1))
    assert np.allclose(scaled.sum(axis=1), 1.0)


def test_one_class_alone_says_nothing() -> None:
    assert fit_temperature(np.zeros(5, int), np.ones((5, 2))) == 1.0
    with pytest.raises(InputError, match="do not fit"):
        fit_temperature(np.zeros(0, int), np.zeros((0, 2)))


def test_reliability_bins() -> None:
    probability = np.array([0.05, 0.05, 0.95, 0.95, 0.95, 1.0])
    positive = np.array([False, True, True, True, False, True])
    bins = reliability(positive, probability, bins=10)
    assert bins.count.tolist() == [2, 4]
    assert bins.observed.tolist() == [0.5, 0.75]
    assert bins.predicted == pytest.approx([0.05, 0.9625])
    assert (bins.low <= bins.observed).all()
    assert (bins.high >= bins.observed).all()
    with pytest.raises(InputError, match="3 labels, 2 probabilities"):
        reliability(np.zeros(3, bool), np.zeros(2))


def test_wilson_against_a_known_value() -> None:
    low, high = wilson(np.array([0.5]), np.array([10]))
    assert (low[0], high[0]) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
