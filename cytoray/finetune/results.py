"""From finished trials to the table: learning rates chosen by validation, means over seeds, CIs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cytoray.evaluation import CELL_METRICS, bootstrap_draws, mean_interval

Result = Mapping[str, Any]
Setting = tuple[str, str, str]


def setting_of(result: Result) -> Setting:
    """What is the same over seeds and learning rates: encoder, adapter, amount."""
    return result["encoder"], result["adapter"], result["amount"]


def _rank(result: Result) -> tuple[float, float]:
    accuracy = result["val"].get("accuracy")
    return (-np.inf if accuracy is None else accuracy, -(result["val"].get("loss") or 0.0))


def best_trial(results: Sequence[Result]) -> Result:
    """The trial with the best validation accuracy; on a tie, the lowest validation loss."""
    return max(results, key=_rank)


def chosen_results(results: Sequence[Result]) -> dict[Setting, list[Result]]:
    """For every setting, the seeds of its best learning rate by validation, in order of seeds.

    The learning rate with the best mean validation accuracy wins, on a tie that with the lower
    loss; one that fewer seeds survived than another is not chosen.
    """
    by_setting: dict[Setting, dict[float, list[Result]]] = {}
    for result in results:
        by_setting.setdefault(setting_of(result), {}).setdefault(result["lr"], []).append(result)
    chosen = {}
    for setting, by_lr in by_setting.items():
        most = max(len(seeds) for seeds in by_lr.values())
        full = [seeds for seeds in by_lr.values() if len(seeds) == most]
        best = max(full, key=lambda seeds: tuple(np.mean([_rank(r) for r in seeds], axis=0)))
        chosen[setting] = sorted(best, key=lambda r: r["seed"])
    return chosen


def result_table(
    results: Sequence[Result],
    labels: np.ndarray,
    groups: np.ndarray,
    probabilities: Callable[[str], np.ndarray],
    *,
    metrics: Sequence[str] = CELL_METRICS,
    n: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row a setting: test metrics of its best learning rate, mean over seeds with two CIs.

    `<metric>_low` and `_high` resample the test groups, with the mean over the seeds taken in each
    draw; `<metric>_seed_low` and `_seed_high` are the t-interval over the seeds.

    Args:
        results: of finished trials.
        labels: (M,) of the test part.
        groups: (M,) of the test part.
        probabilities: (M, C) on the test part by the trial's key.
        metrics: names of `METRICS`.
        n: bootstrap draws.
        seed: of the draws.
    """
    rows = []
    for (encoder, adapter, amount), seeds in chosen_results(results).items():
        row: dict[str, Any] = {
            "encoder": encoder,
            "adapter": adapter,
            "amount": amount,
            "shots": seeds[0]["shots"],
            "share": seeds[0]["share"],
            "lr": seeds[0]["lr"],
            "seeds": len(seeds),
            "images": seeds[0]["num_images"],
            "trained_parameters": seeds[0]["num_trained"],
            "val_accuracy": float(np.mean([r["val"]["accuracy"] for r in seeds])),
        }
        scores = [probabilities(r["key"]) for r in seeds]
        for metric in metrics:
            row |= _summary(metric, seeds, scores, labels, groups, n, seed)
        rows.append(row)
    return rows


def _summary(
    metric: str,
    seeds: Sequence[Result],
    scores: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    n: int,
    seed: int,
) -> dict[str, float]:
    mean, seed_low, seed_high, _ = mean_interval(
        [np.nan if r["test"].get(metric) is None else r["test"][metric] for r in seeds]
    )
    draws = np.mean([bootstrap_draws(labels, s, groups, metric, n, seed) for s in scores], axis=0)
    defined = draws[np.isfinite(draws)]
    low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
    return {
        metric: mean,
        f"{metric}_low": float(low),
        f"{metric}_high": float(high),
        f"{metric}_seed_low": seed_low,
        f"{metric}_seed_high": seed_high,
    }


def predictions_frame(
    examples: Any, rows: np.ndarray, probabilities: np.ndarray, **columns: str
) -> pd.DataFrame:
    """A row for each example answered for: image, group, label, predicted, `p_<class>`.

    Args:
        examples: has `names`, `groups`, `labels` and `classes`.
        rows: (M,) which of them.
        probabilities: (M, C).
        **columns: put in front, the same in every row.
    """
    frame = pd.DataFrame(
        {
            **{name: [value] * len(rows) for name, value in columns.items()},
            "image": [examples.names[i] for i in rows],
            "group": examples.groups[rows],
            "label": [examples.classes[i] for i in examples.labels[rows]],
            "predicted": [examples.classes[i] for i in probabilities.argmax(1)],
        }
    )
    for index, name in enumerate(examples.classes):
        frame[f"p_{name}"] = probabilities[:, index].round(6)
    return frame
