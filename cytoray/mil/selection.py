"""Which configuration is best, by validation alone; the search's table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cytoray.evaluation.operating_points import mean_interval


def best_result(results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The trial with the best validation AUC; on a tie, the lowest validation loss.

    A trial that was stopped early for being worse than others is chosen only where all were.
    """

    def rank(result: Mapping[str, Any]) -> tuple[bool, float, float]:
        auc = result["val"].get("auc")
        stopped = bool(result.get("stopped"))
        return (not stopped, -math.inf if auc is None else auc, -result["val_loss"])

    return max(results, key=rank)


def best_by_fold(results: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The best trial of each fold: it, and only it, is tested on the fold's held-out slides."""
    folds = dict.fromkeys(result["fold"] for result in results)
    return {
        fold: best_result([result for result in results if result["fold"] == fold])
        for fold in folds
    }


def over_folds(results: Sequence[Mapping[str, Any]], num_folds: int) -> list[dict[str, Any]]:
    """One row a candidate: validation mean with its interval over the folds, and time.

    Args:
        results: of the finished trials.
        num_folds: folds of the search; a candidate with fewer is not `complete`.

    Returns:
        Rows sorted from the best on: complete ones first, by mean validation AUC, then loss.
    """
    rows = []
    for key in dict.fromkeys(result["candidate"] for result in results):
        mine = [result for result in results if result["candidate"] == key]
        auc = mean_interval([_number(result["val"].get("auc")) for result in mine])
        accuracy = mean_interval([_number(result["val"].get("accuracy")) for result in mine])
        rows.append(
            {
                "candidate": key,
                "val_auc": auc.point,
                "val_auc_low": auc.low,
                "val_auc_high": auc.high,
                "val_accuracy": accuracy.point,
                "val_loss": sum(result["val_loss"] for result in mine) / len(mine),
                "folds": len(mine),
                "complete": len(mine) == num_folds and not any(r.get("stopped") for r in mine),
                "stopped": sum(bool(result.get("stopped")) for result in mine),
                "best_epoch": sum(result["best_epoch"] for result in mine) / len(mine),
                "seconds": sum(result["seconds"] for result in mine),
            }
        )
    return sorted(rows, key=_rank)


def _rank(row: Mapping[str, Any]) -> tuple[bool, float, float]:
    auc = row["val_auc"]
    return (not row["complete"], math.inf if math.isnan(auc) else -auc, row["val_loss"])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
