"""Patient-clustered bootstrap of the AUC: all draws at once against plain loops.

    python -m benchmarks.bootstrap [--bags 10000] [--draws 1000]

Both loops resample patients draw by draw, one with scikit-learn's `roc_auc_score`, one with the
rank formula. They run on a part of the draws and are scaled up; rounds are interleaved, and the
medians compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from cytoray.evaluation.bootstrap import bootstrap_draws, draw_counts


def rank_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """AUC from the ranks of the positives."""
    positives = int(labels.sum())
    ranks = rankdata(scores)[labels == 1].sum()
    return float(
        (ranks - positives * (positives + 1) / 2) / (positives * (len(labels) - positives))
    )


def plain_loop(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, metric: Callable, draws: int
) -> np.ndarray:
    """Resample patients draw by draw: (draws,)."""
    order = np.argsort(groups, kind="stable")
    bags = np.split(order, np.cumsum(np.bincount(groups))[:-1])
    values = []
    for counts in draw_counts(len(bags), draws, 0):
        for row in counts:
            patients = np.repeat(np.arange(len(bags)), row)
            drawn = np.concatenate([bags[patient] for patient in patients])
            values.append(metric(labels[drawn], scores[drawn]))
    return np.array(values)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bags", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, arguments.bags)
    scores = rng.normal(size=arguments.bags) + labels
    groups = np.unique(rng.integers(0, arguments.bags // 2, arguments.bags), return_inverse=True)[1]
    part = max(1, arguments.draws // 20)
    data = (labels, scores, groups)
    runs = {
        "vectorised": lambda: bootstrap_draws(*data, "auc", arguments.draws),
        "sklearn_loop": lambda: plain_loop(*data, roc_auc_score, part),
        "rank_loop": lambda: plain_loop(*data, rank_auc, part),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    values = {}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            values[name] = run()
            spent = time.perf_counter() - start
            seconds[name].append(spent if name == "vectorised" else spent * arguments.draws / part)
    median = {name: statistics.median(spent) for name, spent in seconds.items()}
    print(f"{arguments.bags} bags, {groups.max() + 1} patients, {arguments.draws} draws")
    figures = {"vectorised_s": median["vectorised"]}
    for name in ("sklearn_loop", "rank_loop"):
        gap = float(np.abs(values["vectorised"][:part] - values[name]).max())
        ratio = median[name] / median["vectorised"]
        figures |= {f"{name}_s": median[name], f"{name}_ratio": ratio, f"{name}_gap": gap}
        print(f"  {name:<13} {median[name]:8.3f} s  {ratio:6.1f}x  largest gap {gap:.1e}")
    print(json.dumps({key: round(v, 4) if v > 1e-6 else v for key, v in figures.items()}))


if __name__ == "__main__":
    main()
