"""Metrics, patient-clustered confidence intervals and patient-grouped splits."""

from cytoray.evaluation.bootstrap import Interval, bootstrap_ci, bootstrap_draws, draw_counts
from cytoray.evaluation.metrics import DEFAULT_METRICS, METRICS, evaluate_scores
from cytoray.evaluation.splits import (
    Split,
    check_no_leak,
    given_split,
    grouped_kfold,
    train_val_test,
)

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Interval",
    "Split",
    "bootstrap_ci",
    "bootstrap_draws",
    "check_no_leak",
    "draw_counts",
    "evaluate_scores",
    "given_split",
    "grouped_kfold",
    "train_val_test",
]
