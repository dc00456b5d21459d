"""Metrics, probes, few-shot curves, patient-clustered intervals and patient-grouped splits."""

from typing import TYPE_CHECKING

from cytoray.lazy import lazy_names

if TYPE_CHECKING:
    from cytoray.evaluation.bootstrap import Interval, bootstrap_ci, bootstrap_draws, draw_counts
    from cytoray.evaluation.compare import Comparison, compare_all, compare_paired
    from cytoray.evaluation.few_shot import (
        SHOTS,
        FewShotPoint,
        FewShotRun,
        draw_share,
        draw_shots,
        few_shot_curve,
        few_shot_runs,
        mean_interval,
    )
    from cytoray.evaluation.metrics import CELL_METRICS, DEFAULT_METRICS, METRICS, evaluate_scores
    from cytoray.evaluation.per_class import (
        CalibrationCurve,
        ClassMetrics,
        calibration_curve,
        confusion_matrix,
        per_class_metrics,
    )
    from cytoray.evaluation.probes import PROBES, Labelled, ProbeResult, run_probe
    from cytoray.evaluation.splits import (
        Split,
        check_no_leak,
        given_split,
        grouped_kfold,
        train_val_test,
    )
    from cytoray.evaluation.weights import Weights

__all__ = [
    "CELL_METRICS",
    "DEFAULT_METRICS",
    "METRICS",
    "PROBES",
    "SHOTS",
    "CalibrationCurve",
    "ClassMetrics",
    "Comparison",
    "FewShotPoint",
    "FewShotRun",
    "Interval",
    "Labelled",
    "ProbeResult",
    "Split",
    "Weights",
    "bootstrap_ci",
    "bootstrap_draws",
    "calibration_curve",
    "check_no_leak",
    "compare_all",
    "compare_paired",
    "confusion_matrix",
    "draw_counts",
    "draw_share",
    "draw_shots",
    "evaluate_scores",
    "few_shot_curve",
    "few_shot_runs",
    "given_split",
    "grouped_kfold",
    "mean_interval",
    "per_class_metrics",
    "run_probe",
    "train_val_test",
]

__getattr__ = lazy_names(
    __name__,
    {
        "bootstrap": ("Interval", "bootstrap_ci", "bootstrap_draws", "draw_counts"),
        "compare": ("Comparison", "compare_all", "compare_paired"),
        "few_shot": (
            "SHOTS",
            "FewShotPoint",
            "FewShotRun",
            "draw_share",
            "draw_shots",
            "few_shot_curve",
            "few_shot_runs",
            "mean_interval",
        ),
        "metrics": ("CELL_METRICS", "DEFAULT_METRICS", "METRICS", "evaluate_scores"),
        "per_class": (
            "CalibrationCurve",
            "ClassMetrics",
            "calibration_curve",
            "confusion_matrix",
            "per_class_metrics",
        ),
        "probes": ("PROBES", "Labelled", "ProbeResult", "run_probe"),
        "splits": ("Split", "check_no_leak", "given_split", "grouped_kfold", "train_val_test"),
        "weights": ("Weights",),
    },
)
