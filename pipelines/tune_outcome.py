"""What a search came to: the chosen heads tested, the summary, the registered model."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cytoray.distributed.chosen import Answers, answer_held_out, assess_answers
from cytoray.distributed.search import run_one
from cytoray.distributed.trials import SearchSettings, TrialSpec
from cytoray.evaluation.held_out import mean_auc
from cytoray.mil.cohort import cohort_facts
from cytoray.mil.selection import best_by_fold, over_folds
from cytoray.mil.space import Candidate
from cytoray.runs import RunFolder
from cytoray.tracking import Tracker, patiently
from cytoray.tracking.head_model import head_facts
from pipelines.tune_search import Search, spec_of

if TYPE_CHECKING:
    from pipelines.tune import Config


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the search came to.

    Attributes:
        best: the chosen result by fold.
        rows: one a candidate, best first; see `over_folds`.
        chosen: the candidate best over all folds.
        final: the result of the head trained on all slides, where there are folds.
        answers: on the held-out slides.
        tests: what a paper reports, by task.
    """

    best: dict[str, Any]
    rows: list[dict[str, Any]]
    chosen: Candidate
    final: dict[str, Any] | None
    answers: Answers
    tests: dict[str, dict[str, Any]]


def test_chosen(
    config: Config,
    folder: RunFolder,
    search: Search,
    specs: list[TrialSpec],
    settings: SearchSettings,
    results: list[dict[str, Any]],
) -> Outcome:
    """Test each fold's chosen trial; train the head to hand out, where there are folds."""
    best = best_by_fold(results)
    rows = over_folds(results, len(best))
    answers = answer_held_out(best, specs, settings, search.cohort)
    chosen = next(c for c in search.candidates if c.key == rows[0]["candidate"])
    head = spec_of(chosen, search.folds[-1], folder)
    final = run_one(head, settings) if config.folds else None
    shutil.copytree(Path(head.folder) / "head", folder.path / "head", dirs_exist_ok=True)
    tests = assess_answers(answers, search.cohort, calibrate=config.calibrate, seed=config.seed)
    return Outcome(
        best=dict(best), rows=rows, chosen=chosen, final=final, answers=answers, tests=tests
    )


def summarise(
    config: Config, folder: RunFolder, search: Search, outcome: Outcome
) -> dict[str, Any]:
    """The facts of `summary.json`."""
    cohort, answers = search.cohort, outcome.answers
    tables = answers.scaled if config.calibrate else answers.probabilities
    labels = [column[answers.indices] for column in cohort.task_labels().values()]
    pairs = list(zip(labels, tables, strict=True))
    interval = mean_auc(pairs, cohort.groups[answers.indices], seed=config.seed)
    first = next(iter(outcome.tests.values()))
    folds = [fold for fold in search.folds if fold.name != "final"]
    return {
        "best": outcome.chosen.key,
        "encoder": search.features[outcome.chosen.encoder].name,
        "val_auc": outcome.rows[0]["val_auc"],
        "val_auc_ci": _interval(outcome.rows[0]["val_auc_low"], outcome.rows[0]["val_auc_high"]),
        "auc_heldout": interval.point,
        "auc_ci": [interval.low, interval.high],
        "auc_over_folds": first["over_folds"].get("auc"),
        "heldout": {name: entry["point"] for name, entry in first["metrics"].items()},
        "tasks": {task: entry["metrics"]["auc"] for task, entry in outcome.tests.items()},
        "chosen": {fold: result["key"] for fold, result in outcome.best.items()},
        "temperatures": answers.temperatures,
        "cohort": cohort_facts(cohort, folds),
        "unit": cohort.unit,
        "classes": list(next(iter(cohort.tasks.values()))),
        "num_heldout": len(answers.indices),
        "num_candidates": len(search.candidates),
        "head": str(folder.path / "head"),
        "leaderboard": str(folder.path / "leaderboard.html"),
    }


def register(
    config: Config,
    tracker: Tracker,
    run_id: str,
    folder: RunFolder,
    search: Search,
    summary: dict[str, Any],
) -> str:
    """Metrics and head in MLflow: the model and its version, or nothing while it is away."""
    metrics = {f"heldout_{name}": value for name, value in summary["heldout"].items()}
    metrics |= {"auc_heldout": summary["auc_heldout"]}
    low, high = summary["auc_ci"]
    metrics |= {"auc_heldout_low": low, "auc_heldout_high": high}
    finite = {name: value for name, value in metrics.items() if value == value}
    features = search.features[0] if len(search.features) == 1 else next(
        entry for entry in search.features if entry.name == summary["encoder"]
    )  # fmt: skip
    tags = {"auc_heldout": f"{summary['auc_heldout']:.4f}", "encoder_id": features.encoder_id}

    def send() -> str:
        tracker.log_metrics(run_id, finite)
        text = f"{summary['best']}, chosen by validation AUC"
        head = folder.path / "head"
        facts = head_facts(features.features[0].shape[1], search.cohort.tasks)
        return tracker.register_model(run_id, config.model_name, head, tags, text, facts)

    version = patiently(send, config.tracking_wait_s)
    return f"{config.model_name} version {version}" if version else ""


def close_parent(tracker: Tracker, run_id: str, folder: RunFolder) -> None:
    """Files of the whole search in MLflow, and the end of its run."""
    tracker.log_artifact(run_id, folder.summary_path)
    tracker.log_artifact(run_id, folder.path / "leaderboard.json")
    tracker.end_run(run_id, "FINISHED")


def _interval(low: float, high: float) -> list[float] | None:
    """Both ends of an interval over folds; None where there is one fold alone."""
    return None if math.isnan(low) else [low, high]
