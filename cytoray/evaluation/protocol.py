"""What `evaluate` measures on frozen features: probes, few-shot curves, maps, comparisons.

Every function takes plain arrays. Shapes: N examples, D width, C classes, M of the test part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cytoray.errors import choose
from cytoray.evaluation.bootstrap import bootstrap_ci
from cytoray.evaluation.compare import Comparison, compare_all, holm
from cytoray.evaluation.few_shot import few_shot_runs
from cytoray.evaluation.metrics import CELL_METRICS
from cytoray.evaluation.per_class import confusion_matrix, per_class_metrics
from cytoray.evaluation.probes import Labelled, run_probe
from cytoray.evaluation.splits import Split

MAP_POINTS = 2000


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled examples of any kind: cell images, tiles or slides.

    Attributes:
        names: (N,).
        labels: (N,) int64, index into `classes`.
        classes: names.
        groups: (N,) str: what must not straddle parts.
        split: the parts.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray
    split: Split

    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """Labels and groups of the test part."""
        return self.labels[self.split.test], self.groups[self.split.test]


def probe_examples(
    name: str, features: np.ndarray, examples: Examples, *, seed: int = 0, **options: Any
) -> tuple[np.ndarray, dict[str, float]]:
    """Train a probe on the training part, choose on the validation part, answer for the test part.

    Returns:
        probabilities (M, C) and what was chosen.

    Raises:
        InputError: see `run_probe`.
    """
    split, labels = examples.split, examples.labels
    answer = run_probe(
        name,
        Labelled(features[split.train], labels[split.train]),
        Labelled(features[split.val], labels[split.val]) if len(split.val) else None,
        features[split.test],
        len(examples.classes),
        seed=seed,
        **options,
    )
    return answer.probabilities, answer.facts


def score_answers(
    probabilities: np.ndarray,
    examples: Examples,
    *,
    metrics: Sequence[str] = CELL_METRICS,
    n: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of the test part with intervals over its groups, class by class, and the confusion.

    Returns:
        `metrics`: name -> [value, low, high]; `per_class`: a dict a class; `confusion`: counts
        (C, C), true class by row.
    """
    labels, groups = examples.test()
    values = {}
    for metric in metrics:
        low, high, point = bootstrap_ci(labels, probabilities, groups, metric, n, seed)
        values[metric] = [point, low, high]
    rows = per_class_metrics(labels, probabilities, examples.classes)
    return {
        "metrics": values,
        "per_class": [asdict(row) for row in rows],
        "confusion": confusion_matrix(labels, probabilities).tolist(),
    }


def few_shot_examples(
    features: np.ndarray,
    examples: Examples,
    *,
    probes: Sequence[str],
    shots: Sequence[int],
    seeds: Sequence[int],
    options: dict[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Every probe on every draw of shots, as plain values; see `few_shot_runs`."""
    runs = few_shot_runs(
        features,
        examples.labels,
        examples.groups,
        examples.split,
        probes=probes,
        shots=shots,
        seeds=seeds,
        options=options,
    )
    return [asdict(run) for run in runs]


def _pca(features: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.decomposition import PCA

    return PCA(n_components=2, random_state=seed).fit_transform(features)


def _tsne(features: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    width = min(50, *features.shape)
    reduced = PCA(n_components=width, random_state=seed).fit_transform(features)
    perplexity = min(30.0, max(2.0, (len(features) - 1) / 3))
    return TSNE(init="pca", perplexity=perplexity, random_state=seed, n_jobs=1).fit_transform(
        reduced
    )


MAPS = {"pca": _pca, "tsne": _tsne}


def embedding_map(features: np.ndarray, method: str = "tsne", seed: int = 0) -> np.ndarray:
    """Features in two dimensions: (M, D) to (M, 2) float64, each standardised first.

    Raises:
        InputError: an unknown method.
    """
    spread = features.std(axis=0, dtype=np.float64)
    scaled = (features - features.mean(axis=0, dtype=np.float64)) / np.where(spread > 0, spread, 1)
    return np.asarray(MAPS[choose("map", method, MAPS)](scaled, seed), dtype=np.float64)


def map_places(split: Split, seed: int = 0) -> np.ndarray:
    """The examples to draw in an embedding map: the test part, at most `MAP_POINTS` of it."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.permutation(split.test)[:MAP_POINTS])


def compare_encoders(
    answers: Mapping[tuple[str, str], np.ndarray],
    examples: Examples,
    metric: str = "accuracy",
    *,
    n: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Every pair of encoders under every probe, Holm's correction over all of them.

    Args:
        answers: (encoder, probe) -> probabilities (M, C).
        examples: their labels and groups.
        metric: a name of `METRICS`.
        n: bootstrap draws.
        seed: of the draws.

    Returns:
        `probe` and the fields of `Comparison`, one dict a pair.
    """
    labels, groups = examples.test()
    found: list[tuple[str, Comparison]] = []
    for probe in dict.fromkeys(probe for _, probe in answers):
        scores = {encoder: value for (encoder, p), value in answers.items() if p == probe}
        if len(scores) > 1:
            pairs = compare_all(labels, scores, groups, metric, n=n, seed=seed)
            found += [(probe, pair) for pair in pairs]
    adjusted = holm([pair.p_value for _, pair in found])
    return [
        {"probe": probe, **asdict(replace(pair, p_adjusted=p))}
        for (probe, pair), p in zip(found, adjusted, strict=True)
    ]
