"""What frozen features tell: kNN, SimpleShot, linear and two-layer probes, in one form.

Every probe takes labelled training features, labelled validation features (or None) and features
to answer for, and gives class probabilities. Shapes: N training, M queries, D width, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn

from cytoray.errors import choose, raise_problems

C_GRID = tuple(10.0**power for power in range(-4, 5))


@dataclass(frozen=True)
class Labelled:
    """Features with their labels.

    Attributes:
        features: (N, D) float, finite.
        labels: (N,) integers in 0..C-1.
    """

    features: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class ProbeResult:
    """A probe's answer.

    Attributes:
        probabilities: (M, C) float64, rows sum to 1.
        facts: what was chosen on the validation part, e.g. C or the epoch, and its accuracy there.
    """

    probabilities: np.ndarray
    facts: dict[str, float] = field(default_factory=dict)


def knn(
    train: Labelled,
    val: Labelled | None,
    queries: np.ndarray,
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
) -> ProbeResult:
    """k nearest neighbours by cosine, votes weighted by exp(cosine / temperature).

    Args:
        train: the neighbours.
        val: not used.
        queries: (M, D).
        num_classes: C.
        k: neighbours, at most N of them.
        temperature: of the votes.
        seed: not used; the answer is deterministic.
    """
    bank, count = _unit(train.features), min(k, len(train.labels))
    votes = np.eye(num_classes)[train.labels]
    parts = []
    for start in range(0, len(queries), 1024):
        cosines = _unit(queries[start : start + 1024]) @ bank.T
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        closeness = np.take_along_axis(cosines, nearest, axis=1)
        weights = np.exp((closeness - closeness.max(axis=1, keepdims=True)) / temperature)
        parts.append(np.einsum("mk,mkc->mc", weights, votes[nearest]))
    scores = np.concatenate(parts)
    return ProbeResult(scores / scores.sum(axis=1, keepdims=True), {"k": float(count)})


def simple_shot(
    train: Labelled, val: Labelled | None, queries: np.ndarray, num_classes: int, *, seed: int = 0
) -> ProbeResult:
    """SimpleShot (Wang et al. 2019, CL2N): nearest class mean of centred, L2-normalised features.

    Args:
        train: of which the means are taken.
        val: not used.
        queries: (M, D).
        num_classes: C.
        seed: not used.

    Returns:
        Softmax of the negative squared distances (without the query's own length).
    """
    centre = train.features.mean(axis=0, dtype=np.float64)
    known, asked = _unit(train.features - centre), _unit(queries - centre)
    means = np.stack([known[train.labels == index].mean(axis=0) for index in range(num_classes)])
    return ProbeResult(_softmax(2.0 * asked @ means.T - (means**2).sum(axis=1)))


def linear(
    train: Labelled,
    val: Labelled | None,
    queries: np.ndarray,
    num_classes: int,
    *,
    c_grid: Sequence[float] = C_GRID,
    max_iterations: int = 5000,
    balanced: bool = False,
    seed: int = 0,
) -> ProbeResult:
    """Multinomial logistic regression on standardised features; C is chosen on `val`.

    The C with the best validation accuracy wins, on a tie that with the lower log loss. Without
    `val`, C is 1.

    Args:
        train: to fit on; its mean and deviation standardise all features.
        val: to choose C on.
        queries: (M, D).
        num_classes: C of classes.
        c_grid: inverse strengths of the L2 penalty to try, rising.
        max_iterations: of L-BFGS, for each C (it starts from the last one's answer).
        balanced: weigh classes by their inverse frequency.
        seed: not used; the answer is deterministic.

    Returns:
        The answer; `unconverged` in its facts: the iterations after which the chosen fit stopped
        short of the optimum.
    """
    mean = train.features.mean(axis=0, dtype=np.float64)
    deviation = train.features.std(axis=0, dtype=np.float64)
    scale = 1.0 / np.where(deviation > 1e-12, deviation, 1.0)
    known, asked = (train.features - mean) * scale, (queries - mean) * scale
    model = LogisticRegression(
        max_iter=max_iterations, warm_start=True, class_weight="balanced" if balanced else None
    )
    if val is None:
        facts = {"c": 1.0} | _fitted(model, 1.0, known, train.labels)
        return ProbeResult(model.predict_proba(asked), facts)
    best, answer, facts = (-np.inf, -np.inf), np.empty(0), {}
    held_out = (val.features - mean) * scale
    for c in c_grid:
        short = _fitted(model, c, known, train.labels)
        accuracy, log_loss = _judged(model.predict_proba(held_out), val.labels)
        if (accuracy, -log_loss) > best:
            best, answer = (accuracy, -log_loss), model.predict_proba(asked)
            facts = {"c": float(c), "val_accuracy": accuracy, "val_loss": log_loss} | short
    return ProbeResult(answer, facts)


def _fitted(
    model: LogisticRegression, c: float, features: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Fit in place; `unconverged` and the iterations where that was not enough, else nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.set_params(C=c).fit(features, labels)
    short = False
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            short = True
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return {"unconverged": float(np.max(model.n_iter_))} if short else {}


def two_layer(
    train: Labelled,
    val: Labelled | None,
    queries: np.ndarray,
    num_classes: int,
    *,
    hidden_dim: int = 768,
    epochs: int = 30,
    batch: int = 32,
    lr: float = 1e-4,
    patience: int = 5,
    seed: int = 0,
) -> ProbeResult:
    """UniCAS's region head: two linear layers with a ReLU between, Adam, cosine, early stopping.

    The epoch with the best validation accuracy answers, on a tie that with the lower log loss;
    without `val` the last one does.

    Args:
        train: to fit on.
        val: to stop on.
        queries: (M, D).
        num_classes: C.
        hidden_dim: between the layers.
        epochs: at most.
        batch: features a step.
        lr: at the start; cosine to 0.
        patience: epochs without a better validation accuracy or loss before it stops.
        seed: of the weights and the order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(train.features.shape[1], hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, num_classes),
        )
        optimiser = torch.optim.Adam(model.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
        features, labels = torch.from_numpy(train.features), torch.from_numpy(train.labels)
        best, facts, answer = (-np.inf, -np.inf), {}, np.empty(0)
        for epoch in range(1, epochs + 1):
            for chosen in torch.randperm(len(labels)).split(batch):
                loss = F.cross_entropy(model(features[chosen]), labels[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            schedule.step()
            if val is None:
                continue
            accuracy, log_loss = _judged(_answers(model, val.features), val.labels)
            if (accuracy, -log_loss) > best:
                best, answer = (accuracy, -log_loss), _answers(model, queries)
                facts = {"epoch": float(epoch), "val_accuracy": accuracy, "val_loss": log_loss}
            elif epoch - facts["epoch"] >= patience:
                break
    return ProbeResult(_answers(model, queries) if val is None else answer, facts)


Probe = Callable[..., ProbeResult]
PROBES: dict[str, Probe] = {
    "knn": knn,
    "simple_shot": simple_shot,
    "linear": linear,
    "two_layer": two_layer,
}


def run_probe(
    name: str,
    train: Labelled,
    val: Labelled | None,
    queries: np.ndarray,
    num_classes: int,
    **options: Any,
) -> ProbeResult:
    """Check the input and run a probe of `PROBES`.

    Args:
        name: of the probe.
        train: at least one of every class.
        val: or None.
        queries: (M, D), M >= 1.
        num_classes: C, at least 2.
        **options: the probe's own.

    Raises:
        InputError: an unknown probe, or features and labels that do not fit; all problems.
    """
    probe = PROBES[choose("probe", name, PROBES)]
    parts = {"training": train} | ({} if val is None else {"validation": val})
    width = train.features.shape[-1]
    problems = _feature_problems("test", queries, width)
    for part, labelled in parts.items():
        problems += _feature_problems(part, labelled.features, width)
        problems += _label_problems(part, labelled, num_classes)
    raise_problems("these features cannot be probed:", problems)
    cast = [
        part and Labelled(part.features.astype(np.float32), part.labels.astype(np.int64))
        for part in (train, val)
    ]
    return probe(*cast, queries.astype(np.float32), num_classes, **options)


def _feature_problems(part: str, features: np.ndarray, width: int) -> list[str]:
    if features.ndim != 2 or not len(features) or features.shape[1] != width:
        return [f"{part} features have shape {features.shape}, expected (N >= 1, {width})"]
    bad = int((~np.isfinite(features)).any(axis=1).sum())
    return [f"{bad} of the {part} features are NaN or infinite"] if bad else []


def _label_problems(part: str, labelled: Labelled, num_classes: int) -> list[str]:
    labels = labelled.labels
    if labels.shape != (len(labelled.features),):
        return [f"{part}: {labels.shape} labels for {len(labelled.features)} features"]
    if not np.isin(labels, np.arange(num_classes)).all():
        return [f"{part} labels must be whole numbers in 0..{num_classes - 1}"]
    missing = sorted(set(range(num_classes)) - set(labels.tolist()))
    if part == "training" and (missing or num_classes < 2):
        return [f"training needs at least 2 classes and one example of each; missing: {missing}"]
    return []


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1 (a row of zeros stays)."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@torch.no_grad()
def _answers(model: nn.Module, features: np.ndarray) -> np.ndarray:
    return _softmax(model(torch.from_numpy(features)).double().numpy())


def _judged(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy and log loss."""
    chosen = probabilities[np.arange(len(labels)), labels]
    accuracy = float((probabilities.argmax(axis=1) == labels).mean())
    return accuracy, float(-np.log(np.maximum(chosen, 1e-12)).mean())
