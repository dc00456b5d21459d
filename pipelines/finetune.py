"""`cytoray finetune`: encoders x adapters x amounts of labelled cell images x seeds, in MLflow."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from cytoray.config import to_plain
from cytoray.distributed.cells import (
    CellSettings,
    facts_of_encoders,
    prepare_images,
)
from cytoray.distributed.finetune import read_answers, run_cell_trial, trial_pieces
from cytoray.distributed.pieces import Piece, run_pieces
from cytoray.errors import InputError, raise_problems
from cytoray.evaluation.baselines import BASELINES
from cytoray.finetune import (
    FITS,
    Cells,
    CellTrial,
    Columns,
    TrainConfig,
    best_trial,
    export_encoder,
    grid_trials,
    load_classifier,
    parse_adapter,
    predictions_frame,
    read_cells,
    result_table,
)
from cytoray.finetune.data import check_shots, split_counts
from cytoray.io import atomic_write_text
from cytoray.plain import json_ready
from cytoray.progress import Progress, summary_table
from cytoray.report.finetune_page import finetune_sections
from cytoray.report.page import write_report
from cytoray.runs import MAY_CHANGE, RunFolder
from cytoray.tracking import ModelFacts, Tracker
from pipelines.cell_jobs import begin, class_lines, split_of

MAY_CHANGE_HERE = MAY_CHANGE | {
    "cpus_per_trial", "gpus_per_trial", "max_concurrent", "experiment", "strict", "model_name",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Adapt encoders to labelled cell images and measure how much data each way needs.

    Attributes:
        cells: a folder with one folder per class, or a CSV (path, label, group, split).
        out: folder of this run.
        encoders: to try: `clip`, `quilt`, `biomedclip`, `uni`, `gigapath`, `vit`, any timm name,
            `hf-hub:...`, `open_clip:...`, NAME@FILE, `random:NAME`, or a folder of `pretrain`.
        adapters: what is trained: `linear`, `lora` (q,v rank 2), `lora16` (q,k,v,o rank 16),
            `lora:TARGETS:RANK` with targets of q, k, v, o, mlp, `full`.
        shots: examples of each class to learn from.
        shares: shares of the training images to learn from, e.g. 0.05 1.0.
        seeds: of the draw and the training.
        lrs: learning rates to try; the best on validation is reported for each setting.
        alpha: of LoRA.
        dropout: of LoRA.
        train: everything else of a trial.
        columns: columns of the CSV; `columns.group-pattern` finds groups in names of a folder.
        fit: how an image becomes square: squash, crop (its middle) or pad.
        val_fraction: share of the groups that chooses, where the CSV has no split.
        test_fraction: share of the groups to test on, where the CSV has no split.
        split_seed: of that split.
        pretrained: published weights, else random ones.
        cpus_per_trial: CPUs of a trial.
        gpus_per_trial: GPUs of a trial, a fraction packs several; default: 1 where there are any.
        max_concurrent: trials at a time; 0: as many as fit.
        model_name: name in the MLflow registry.
        tracking_uri: MLflow; default: a SQLite file in the working folder.
        experiment: MLflow experiment.
        strict: exit with code 3 when an image could not be read.
        dry_run: say what would be run, and stop.
        resume: go on with the run in `out`; finished trials are not run again.
        address: a running Ray cluster; default: start one here.
    """

    cells: Path
    out: Path
    encoders: tuple[str, ...]
    adapters: tuple[str, ...] = ("linear", "lora")
    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 50)
    shares: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = (1e-3, 1e-4)
    alpha: float = 1.0
    dropout: float = 0.25
    train: TrainConfig = field(default_factory=TrainConfig)
    columns: Columns = field(default_factory=Columns)
    fit: str = "squash"
    val_fraction: float = 0.15
    test_fraction: float = 0.25
    split_seed: int = 0
    pretrained: bool = True
    cpus_per_trial: float = 1.0
    gpus_per_trial: float | None = None
    max_concurrent: int = 0
    model_name: str = "cytoray-cells"
    tracking_uri: str = ""
    experiment: str = "cytoray"
    strict: bool = False
    dry_run: bool = False
    resume: bool = False
    address: str | None = None

    def __post_init__(self) -> None:
        needed = {"encoders": self.encoders, "adapters": self.adapters, "seeds": self.seeds}
        needed |= {"lrs": self.lrs, "shots or --shares": (*self.shots, *self.shares)}
        problems = [f"--{name} needs a value" for name, given in needed.items() if not given]
        problems += [f"--shots {n} must be 1 or more" for n in self.shots if n < 1]
        problems += [f"--shares {s:g} must be above 0 to 1" for s in self.shares if not 0 < s <= 1]
        problems += [f"--lrs {lr:g} must be above 0" for lr in self.lrs if lr <= 0]
        if min(self.split_seed, self.max_concurrent, *self.seeds, 0) < 0:
            problems.append("--seeds, --split-seed and --max-concurrent must be 0 or more")
        if self.fit not in FITS:
            problems.append(f"--fit {self.fit!r} is none of {', '.join(FITS)}")
        problems += [
            f"--encoders {name} has nothing to adapt; it is for `cytoray evaluate`"
            for name in self.encoders
            if name in BASELINES
        ]
        fractions = (self.val_fraction, self.test_fraction)
        if min(fractions) <= 0 or sum(fractions) >= 1:
            problems.append("--val-fraction and --test-fraction must be above 0 and sum below 1")
        for name in self.adapters:
            try:
                parse_adapter(name, alpha=self.alpha, dropout=self.dropout)
            except InputError as error:
                problems += [
                    f"--adapters {name}: {text}" for text in error.problems or [str(error)]
                ]
        if self.cpus_per_trial <= 0 or (self.gpus_per_trial or 0) < 0:
            problems.append("--cpus-per-trial must be above 0, --gpus-per-trial 0 or more")
        raise_problems("these trials cannot be run:", problems)


def run(config: Config) -> dict[str, Any]:
    """Run the trials, choose by validation, report on the test part, export the best encoder."""
    began = time.perf_counter()
    trials = trials_of(config)
    cells = read_cells(config.cells, config.columns)
    check_shots(cells, split_of(config, cells), max(config.shots, default=0))
    if config.dry_run:
        return _plan(config, trials, cells)
    targets = {trial.adapter.targets for trial in trials if trial.adapter.kind == "lora"}
    encoders = facts_of_encoders(config.encoders, config.pretrained, sorted(targets))
    begun = begin(
        "finetune", config, config.cells.stem, unit="trial", cpus=config.cpus_per_trial,
        gpus=config.gpus_per_trial, may_change=MAY_CHANGE_HERE,
    )  # fmt: skip
    folder, tracker, run_id, gpus = begun.folder, begun.tracker, begun.run_id, begun.gpus
    with Progress(f"finetune {len(trials)} trials on {len(cells):,} images") as progress:
        settings, num_bad = prepare_images(
            cells, encoders, folder.path, stage="finetune", progress=progress, gpus=gpus,
            split=lambda readable: split_of(config, readable), fit=config.fit,
            pretrained=config.pretrained, tracking_uri=tracker.uri,
            features=any(not trial.adapter.needs_pixels for trial in trials),
            extra={"cells": str(config.cells)},
        )  # fmt: skip
        check_shots(settings.data.cells, settings.split, max(config.shots, default=0))
        results, failed = _run_trials(
            config, folder, trials, settings, gpus, tracker, run_id, progress
        )
    if not results:
        tracker.end_run(run_id, "FAILED")
        raise InputError("every trial failed", [f"{k}: {v}" for k, v in failed.items()])
    summary = _finish(config, folder, settings, results, failed, tracker, run_id)
    summary |= {
        "num_quarantined": num_bad,
        "seconds": round(time.perf_counter() - began, 1),
    }
    folder.write_summary(summary)
    tracker.log_artifact(run_id, folder.summary_path)
    tracker.end_run(run_id, "FINISHED")
    sections = finetune_sections(folder.path, settings.data, settings.split)
    write_report(folder.report_path, sections, "Fine-tuning on cell images", str(folder.path))
    summary_table("finetune", {k: v for k, v in summary.items() if k not in ("table", "parts")})
    _print_table(summary["table"])
    return summary | {"exit_code": 3 if config.strict and num_bad else 0}


def trials_of(config: Config) -> list[CellTrial]:
    """The whole grid."""
    return grid_trials(
        config.encoders,
        [parse_adapter(n, alpha=config.alpha, dropout=config.dropout) for n in config.adapters],
        [(shots, 1.0) for shots in config.shots] + [(0, share) for share in config.shares],
        config.lrs,
        config.seeds,
        config.train,
    )


def _run_trials(
    config: Config,
    folder: RunFolder,
    trials: list[CellTrial],
    settings: CellSettings,
    gpus: float,
    tracker: Tracker,
    parent_run_id: str,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Run what has no result yet; each trial has one MLflow run, closed when it ends."""
    seen: list[dict[str, Any]] = []

    def start(piece: Piece) -> Piece:
        trial = to_plain(piece.payload)
        run_id = tracker.start_run(
            piece.key, params=trial, tags={"cytoray.job": "trial"},
            parent_run_id=parent_run_id, key=f"{folder.run_id}:{piece.key}",
        )  # fmt: skip
        return replace(piece, run_id=run_id)

    def done(piece: Piece, result: dict[str, Any] | None, error: str) -> None:
        tracker.end_run(piece.run_id, "FAILED" if error else "FINISHED")
        if error:
            tracker.set_tags(piece.run_id, {"cytoray.error": error[:500]})
        if result is not None:
            seen.append(result)
            best = best_trial(seen)
            if best["key"] == result["key"]:
                score = best["val"]["accuracy"]
                progress.note(f"best so far: {best['key']}, val accuracy {score:.3f}")
            _prune(folder.path, seen, best["key"])

    results, failed = run_pieces(
        trial_pieces(trials, folder.path), run_cell_trial, settings,
        cpus=config.cpus_per_trial, gpus=gpus, max_concurrent=config.max_concurrent,
        on_start=start, on_done=done,
        on_progress=lambda done, total: progress.update("trials", done, total, "trials"),
    )  # fmt: skip
    finished = {result["run_id"] for result in results}
    for child in tracker.child_runs(parent_run_id):
        if child.run_id in finished and child.status != "FINISHED":
            tracker.end_run(child.run_id, "FINISHED")
    return results, failed


def _prune(out: Path, results: list[dict[str, Any]], best: str) -> None:
    """Of encoders trained whole, which are large, keep only the best so far."""
    for result in results:
        if result["adapter"] == "full" and result["key"] != best:
            shutil.rmtree(out / "trials" / result["key"] / "adapter", ignore_errors=True)


def _finish(
    config: Config,
    folder: RunFolder,
    settings: CellSettings,
    results: list[dict[str, Any]],
    failed: dict[str, str],
    tracker: Tracker,
    run_id: str,
) -> dict[str, Any]:
    """Table, best adapter, merged encoder, predictions, registered model; the summary."""
    cells, split = settings.data.cells, settings.split
    labels, groups = cells.labels[split.test], cells.groups[split.test]
    table = result_table(
        results, labels, groups, lambda key: read_answers(folder.path, key), seed=config.split_seed
    )
    best = best_trial(results)
    adapter = folder.path / "best" / "adapter"
    shutil.copytree(folder.path / "trials" / best["key"] / "adapter", adapter, dirs_exist_ok=True)
    export_encoder(folder.path / "best" / "encoder", load_classifier(adapter))
    answers = read_answers(folder.path, best["key"])
    frame = predictions_frame(cells, split.test, answers)
    atomic_write_text(folder.path / "predictions.csv", frame.to_csv(index=False))
    version = tracker.register_model(
        run_id, config.model_name, adapter,
        tags={"val_accuracy": f"{best['val']['accuracy']:.4f}", "encoder": best["encoder"]},
        description=f"{best['key']}, chosen by validation accuracy",
        facts=ModelFacts(
            inputs={"images": ("uint8", (-1, -1, -1, 3))},
            outputs={"probabilities": ("float32", (-1, len(cells.classes)))},
        ),
    )  # fmt: skip
    values = {f"test_{k}": v for k, v in best["test"].items() if v is not None}
    tracker.log_metrics(run_id, values)
    pd.DataFrame(table).to_csv(folder.path / "table.csv", index=False)
    atomic_write_text(
        folder.path / "results.json", json.dumps(json_ready({"table": table, "trials": results}))
    )
    tracker.log_artifact(run_id, folder.path / "results.json")
    return {
        "best": best["key"],
        "best_val_accuracy": best["val"]["accuracy"],
        "best_test": best["test"],
        "classes": list(cells.classes),
        "num_images": len(cells),
        "num_groups": len(set(cells.groups.tolist())),
        "groups": "as given" if cells.grouped else "none given: each image counts as its own",
        "parts": split_counts(cells, split),
        "num_trials": len(results) + len(failed),
        "failed": failed,
        "table": table,
        "adapter": str(adapter),
        "encoder": str(folder.path / "best" / "encoder"),
        "registered_model": f"{config.model_name} version {version}",
        "mlflow_run_id": run_id,
        "mlflow_ui": tracker.ui_command(),
        "report": str(folder.report_path),
        "next": f"cytoray evaluate --cells {config.cells} --encoders "
        f"{folder.path / 'best' / 'encoder'} --out EVALUATE",
    }


def _plan(config: Config, trials: list[CellTrial], cells: Cells) -> dict[str, Any]:
    """What a run would do."""
    split = split_of(config, cells)
    pool = len(split.train)
    plan = {
        "trials": len(trials),
        "encoders": ", ".join(config.encoders),
        "adapters": ", ".join(config.adapters),
        "images": len(cells),
        "groups": len(set(cells.groups.tolist())) if cells.grouped else "none given",
        "steps": sum(t.train.num_steps(round(t.share * pool), t.shots) for t in trials),
    }
    summary_table("finetune would run", plan | class_lines(cells, split))
    return plan


def _print_table(table: list[dict[str, Any]]) -> None:
    def shown(row: dict[str, Any]) -> str:
        low, high = row["accuracy_low"], row["accuracy_high"]
        return (
            f"accuracy {row['accuracy']:.3f} ({low:.3f} to {high:.3f}), macro F1 "
            f"{row['macro_f1']:.3f}, AUC {row['auc']:.3f}, lr {row['lr']:g}"
        )

    summary_table(
        "test part, mean over seeds (95 % CI over groups)",
        [(f"{row['encoder']} {row['adapter']} {row['amount']}", shown(row)) for row in table],
    )


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("finetune")
