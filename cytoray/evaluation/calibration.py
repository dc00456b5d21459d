"""Are the probabilities honest: temperature scaling, and predicted against observed frequency."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from cytoray.errors import InputError

LOG_TEMPERATURES = (-3.0, 3.0)


@dataclass(frozen=True)
class Reliability:
    """Predicted probability against observed frequency, in equal bins; empty bins are left out.

    Attributes:
        predicted: (B,) mean probability of a bin.
        observed: (B,) share of positives.
        low, high: (B,) 95 % Wilson interval of `observed`.
        count: (B,) bags.
    """

    predicted: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """The temperature T that makes softmax(logits / T) likeliest (Guo et al. 2017).

    Args:
        labels: (N,) int in 0..C-1, of slides the model was not trained on (validation).
        logits: (N, C).

    Returns:
        T within e^-3..e^3; 1 where the labels are of one class alone, which says nothing.

    Raises:
        InputError: no slide, or labels and logits that do not fit.
    """
    labels, logits = np.asarray(labels), np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or len(labels) != len(logits) or not len(labels):
        raise InputError(f"labels {labels.shape} and logits {logits.shape} do not fit")
    if len(np.unique(labels)) < 2:
        return 1.0
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-scaled[rows, labels].mean())

    found = minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded")
    return float(np.exp(found.x))  # type: ignore[attr-defined]


def scaled_probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature): (N, C) float64. The order of the classes does not change."""
    return softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)


def reliability(positive: np.ndarray, probability: np.ndarray, bins: int = 10) -> Reliability:
    """Observed frequency of a class where it was predicted with about some probability.

    Args:
        positive: (N,) bool.
        probability: (N,) in 0..1.
        bins: equal bins between 0 and 1.

    Raises:
        InputError: lengths differ, or no bin.
    """
    positive, probability = np.asarray(positive, bool), np.asarray(probability, np.float64)
    if positive.shape != probability.shape or bins < 1:
        raise InputError(f"{len(positive)} labels, {len(probability)} probabilities, {bins} bins")
    place = np.clip((probability * bins).astype(int), 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    used = count > 0
    count = count[used]
    predicted = np.bincount(place, probability, minlength=bins)[used] / count
    observed = np.bincount(place, positive, minlength=bins)[used] / count
    return Reliability(predicted, observed, *wilson(observed, count), count)


def wilson(share: np.ndarray, count: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a share among `count` draws: (low, high)."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return np.clip(centre - half, 0.0, 1.0), np.clip(centre + half, 0.0, 1.0)
