"""`cytoray tune`: a grid over MIL aggregators and LoRA ranks, tracked in MLflow."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.config import to_plain
from cytoray.distributed.cluster import Need, Shared, check_fits, connect
from cytoray.distributed.embed import EncoderChoice
from cytoray.distributed.search import (
    Cohort,
    HeldOut,
    SearchSettings,
    TrialSpec,
    best_result,
    predict_part,
    read_features,
    run_grid,
)
from cytoray.errors import InputError, choose, raise_problems
from cytoray.evaluation import bootstrap_ci, check_no_leak, evaluate_scores, train_val_test
from cytoray.io import atomic_write_text
from cytoray.mil import AGGREGATORS, BagStore, MILConfig, open_bags
from cytoray.plain import json_ready
from cytoray.progress import Progress, summary_table
from cytoray.report import write_report
from cytoray.report.sections import attention_section, tune_sections
from cytoray.runs import MAY_CHANGE, RunFolder
from cytoray.slides import SLIDE_SCHEMA, read_slide_table
from cytoray.streaming.plan import ReadPlan
from cytoray.tracking import Tracker
from pipelines.embed import index_plan


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train every aggregator with every LoRA rank, keep the best by validation, test it once.

    Attributes:
        bags: folder of bags written by `cytoray embed` (`.../bags`).
        index: folder written by `cytoray index`: labels, splits, patients, and the slides.
        encoder: the encoder that made the bags (trials with a LoRA rank adapt it).
        out: folder of this run.
        label: label column of the manifest.
        aggregators: names to try.
        lora_ranks: ranks to try; 0 leaves the encoder frozen.
        lrs: learning rates of the aggregator to try.
        mil: everything else of a trial.
        lora_epochs: epochs end to end of trials with a LoRA rank; before them the head learns on
            the frozen features for `mil.epochs`.
        val_fraction: share of the training patients held back to choose the epoch and the trial.
        test_fraction: share of the patients to test on, where the manifest has no `split`.
        seed: of the split.
        pretrained: for a timm encoder: published weights, else random ones.
        cpus_per_trial: CPUs of a trial.
        gpus_per_trial: GPUs of a trial, a fraction packs several on one.
        max_concurrent: trials at a time; 0: as many as fit.
        model_name: name in the MLflow registry.
        tracking_uri: MLflow; default: a SQLite file in the working folder.
        experiment: MLflow experiment.
        resume: go on with the grid in `out`; finished trials are not run again.
        address: a running Ray cluster; default: start one here.
    """

    bags: Path
    index: Path
    encoder: str
    out: Path
    label: str = "label"
    aggregators: tuple[str, ...] = ("mean", "abmil")
    lora_ranks: tuple[int, ...] = (0, 4)
    lrs: tuple[float, ...] = (5e-4,)
    mil: MILConfig = field(default_factory=MILConfig)
    lora_epochs: int = 10
    val_fraction: float = 0.25
    test_fraction: float = 0.25
    seed: int = 0
    pretrained: bool = True
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    max_concurrent: int = 0
    model_name: str = "cytoray-head"
    tracking_uri: str = ""
    experiment: str = "cytoray"
    resume: bool = False
    address: str | None = None

    def __post_init__(self) -> None:
        lists = {"aggregators": self.aggregators, "lora-ranks": self.lora_ranks, "lrs": self.lrs}
        shares = {"val-fraction": self.val_fraction, "test-fraction": self.test_fraction}
        problems = [f"--{name} needs a value" for name, given in lists.items() if not given]
        problems += [
            f"--{name} must be above 0 and below 1, not {share:g}"
            for name, share in shares.items()
            if not 0 < share < 1
        ]
        if self.lora_epochs < 1:
            problems.append(f"--lora-epochs must be 1 or more, not {self.lora_epochs}")
        if self.cpus_per_trial <= 0 or self.gpus_per_trial < 0:
            problems.append("--cpus-per-trial must be above 0, --gpus-per-trial 0 or more")
        raise_problems("this grid cannot be run:", problems)


def run(config: Config) -> dict[str, Any]:
    """Run the grid, choose by validation, evaluate on the held-out slides, register the head."""
    began = time.perf_counter()
    for name in config.aggregators:
        choose("aggregator", name, AGGREGATORS)
    grid = grid_configs(config)
    store = open_bags(config.bags)
    cohort = read_cohort(config, store)
    choice = EncoderChoice(source=config.encoder, pretrained=config.pretrained)
    _check_encoder(choice, cohort)
    may_change = MAY_CHANGE | {"cpus_per_trial", "gpus_per_trial", "max_concurrent", "experiment"}
    connect(config.address)
    check_fits(
        [Need(what="trial", count=1, cpus=config.cpus_per_trial, gpus=config.gpus_per_trial)],
        hint="ask for less --cpus-per-trial or --gpus-per-trial",
    )
    folder = RunFolder.open(config.out, "tune", to_plain(config), config.resume, may_change)
    tracker = Tracker(config.tracking_uri or None, config.experiment)
    run_id = tracker.start_run(
        f"tune {config.label}", params=to_plain(config), tags={"cytoray.job": "tune"},
        key=folder.run_id,
    )  # fmt: skip
    specs = [trial_spec(mil, folder, tracker, run_id) for mil in grid]
    uses_lora = any(rank > 0 for rank in config.lora_ranks)
    settings = SearchSettings(
        cohort=Shared(cohort),
        plan=Shared(index_plan(config.index)) if uses_lora else None,
        encoder=choice,
        tracking_uri=tracker.uri,
        cpus_per_trial=config.cpus_per_trial,
        gpus_per_trial=config.gpus_per_trial,
        extra={"label": config.label, "bags": str(config.bags)},
    )
    with Progress(f"tune {len(specs)} trials on {len(cohort.slide_ids)} slides") as progress:
        results, failed = run_grid(
            specs, settings, folder.path, progress=progress, max_concurrent=config.max_concurrent
        )
    failed = hide_paths(failed, config.index)
    _close_children(tracker, specs, results, failed)
    if not results:
        tracker.end_run(run_id, "FAILED")
        raise InputError("every trial failed", [f"{k}: {v}" for k, v in failed.items()])
    best = best_result(results)
    answers = predict_part(_spec_of(specs, best).folder / Path("head"), settings, "test")
    return _finish(
        config, folder, tracker, run_id, cohort, specs, results, failed, best, answers,
        time.perf_counter() - began,
    )  # fmt: skip


def read_cohort(config: Config, store: BagStore) -> Cohort:
    """Labels, patients and parts of the slides that have a bag and a label.

    Raises:
        InputError: no such label column, fewer than two classes, a split that leaks a patient.
    """
    slides = read_slide_table(config.index / "slides.parquet")
    labels_there = [name for name in slides.column_names if name not in SLIDE_SCHEMA.names]
    choose("label column", config.label, labels_there)
    rows = [
        row
        for row in slides.to_pylist()
        if row["status"] == "ok" and row[config.label] is not None and row["slide_id"] in store
    ]
    names = sorted({str(row[config.label]) for row in rows})
    if len(names) < 2:
        raise InputError(
            f"label {config.label!r} has {len(names)} class(es) among the {len(rows)} slides that "
            "have a bag; two are needed"
        )
    labels = np.array([names.index(str(row[config.label])) for row in rows], dtype=np.int64)
    patients = [row["patient_id"] for row in rows]
    ids = [row["slide_id"] for row in rows]
    features, tile_ids = read_features(store, ids)
    return Cohort(
        slide_ids=ids,
        labels=labels,
        patients=patients,
        parts=_parts(config, rows, labels, np.array(patients)),
        classes=tuple(names),
        features=features,
        tile_ids=tile_ids,
        encoder_id=store.info(ids[0]).meta.encoder_id,
    )


def _parts(
    config: Config, rows: list[dict[str, Any]], labels: np.ndarray, patients: np.ndarray
) -> dict[str, np.ndarray]:
    """The manifest's split where it has one (a validation part is cut from train), else ours."""
    given = [row["split"] for row in rows]
    if not any(given):
        rest = 1.0 - config.test_fraction
        fractions = (rest * (1 - config.val_fraction), rest * config.val_fraction,
                     config.test_fraction)  # fmt: skip
        return train_val_test(labels, patients, fractions, config.seed)._asdict()
    split = train_val_test(labels, patients, split=given)
    problems = [f"no slide in split `{name}`" for name in ("train", "test")
                if not len(getattr(split, name))]  # fmt: skip
    raise_problems("the manifest's `split` column cannot be used:", problems)
    train, val = split.train, split.val
    if not len(val):
        cut = train_val_test(
            labels[train], patients[train], (1 - config.val_fraction, config.val_fraction, 0.0),
            config.seed,
        )  # fmt: skip
        train, val = train[cut.train], train[cut.val]
    parts = {"train": train, "val": val, "test": split.test}
    check_no_leak(patients, parts)
    return parts


def _check_encoder(choice: EncoderChoice, cohort: Cohort) -> None:
    encoder_id = choice.load().encoder_id
    if encoder_id != cohort.encoder_id:
        raise InputError(
            f"the bags were made by encoder {cohort.encoder_id}, --encoder {choice.source} is "
            f"{encoder_id}; embed again, or name the encoder that made them"
        )


def grid_configs(config: Config) -> list[MILConfig]:
    """Every combination once.

    Raises:
        InputError: a value no trial can have.
    """
    trials = []
    grid = itertools.product(config.aggregators, config.lora_ranks, config.lrs)
    for aggregator, rank, lr in dict.fromkeys(grid):
        mil = replace(config.mil, aggregator=aggregator, lora_rank=rank, lr=lr)
        if rank > 0:
            mil = replace(mil, epochs=config.lora_epochs, warm_start_epochs=config.mil.epochs)
        trials.append(mil)
    return trials


def trial_spec(
    mil: MILConfig, folder: RunFolder, tracker: Tracker, parent_run_id: str
) -> TrialSpec:
    """A trial with a name, a folder and an MLflow run that are the same on resume."""
    text = json.dumps(to_plain(mil), sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    key = f"{mil.aggregator}-r{mil.lora_rank}-lr{mil.lr:g}-{digest}"
    run_id = tracker.start_run(
        key,
        params=to_plain(mil),
        tags={"cytoray.job": "trial"},
        parent_run_id=parent_run_id,
        key=f"{folder.run_id}:{key}",
    )
    place = str(folder.path / "trials" / key)
    return TrialSpec(key=key, config=mil, folder=place, run_id=run_id)


def _spec_of(specs: list[TrialSpec], result: dict[str, Any]) -> Any:
    spec = next(spec for spec in specs if spec.key == result["key"])
    return replace(spec, folder=Path(spec.folder))  # type: ignore[arg-type]


def hide_paths(failed: dict[str, str], index: Path) -> dict[str, str]:
    """Messages of failed trials without the paths of slides: they go to MLflow and the report."""
    if not failed:
        return {}
    for path in read_slide_table(index / "slides.parquet").column("path").to_pylist():
        failed = {key: text.replace(path, "a slide's file") for key, text in failed.items()}
    return failed


def _close_children(
    tracker: Tracker,
    specs: list[TrialSpec],
    results: list[dict[str, Any]],
    failed: dict[str, str],
) -> None:
    done = {result["key"] for result in results}
    for spec in specs:
        tracker.end_run(spec.run_id, "FINISHED" if spec.key in done else "FAILED")
        if spec.key in failed:
            tracker.set_tags(spec.run_id, {"cytoray.error": failed[spec.key][:500]})


def _finish(
    config: Config,
    folder: RunFolder,
    tracker: Tracker,
    run_id: str,
    cohort: Cohort,
    specs: list[TrialSpec],
    results: list[dict[str, Any]],
    failed: dict[str, str],
    best: dict[str, Any],
    answers: HeldOut,
    seconds: float,
) -> dict[str, Any]:
    test = cohort.parts["test"]
    labels = cohort.labels[test]
    patients = np.array(cohort.patients)[test]
    binary = len(cohort.classes) == 2
    scores = answers.probabilities[:, 1] if binary else answers.probabilities
    interval = bootstrap_ci(labels, scores, patients, "auc", n=1000, seed=config.seed)
    metrics = evaluate_scores(labels, answers.probabilities)
    source = Path(_spec_of(specs, best).folder) / "head"
    shutil.copytree(source, folder.path / "head", dirs_exist_ok=True)
    version = tracker.register_model(
        run_id,
        config.model_name,
        folder.path / "head",
        tags={"auc_heldout": f"{interval.point:.4f}", "encoder_id": cohort.encoder_id},
        description=f"{best['key']}, chosen by validation AUC",
    )
    _write_predictions(folder, cohort, answers)
    finite = {f"heldout_{name}": value for name, value in metrics.items() if value == value}
    tracker.log_metrics(
        run_id, finite | {"auc_heldout": interval.point, "auc_heldout_low": interval.low,
                          "auc_heldout_high": interval.high}
    )  # fmt: skip
    summary = {
        "best": best["key"],
        "val_auc": best["val"]["auc"],
        "auc_heldout": interval.point,
        "auc_ci": [interval.low, interval.high],
        "heldout": metrics,
        "cohort": cohort_facts(cohort),
        "classes": list(cohort.classes),
        "num_heldout": len(test),
        "num_trials": len(specs),
        "failed": failed,
        "head": str(folder.path / "head"),
        "registered_model": f"{config.model_name} version {version}",
        "mlflow_run_id": run_id,
        "mlflow_ui": tracker.ui_command(),
        "report": str(folder.report_path),
        "seconds": round(seconds, 1),
    }
    folder.write_summary(summary)
    tracker.log_artifact(run_id, folder.summary_path)
    tracker.end_run(run_id, "FINISHED")
    sections = report_sections(folder.path, index_plan(config.index))
    write_report(folder.report_path, sections, f"Tuning {config.label}", str(folder.path))
    shown = {k: v for k, v in summary.items() if k not in ("heldout", "cohort", "classes")}
    summary_table("tune", shown)
    return summary


def report_sections(out: Path, plan: ReadPlan) -> list[dict[str, Any]]:
    """The report's sections of a finished run, from its files alone."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    results = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((out / "trials").glob("*/result.json"))
    ]
    rows = json.loads((out / "heldout.json").read_text(encoding="utf-8"))
    classes = summary["classes"]
    held_out = {
        "labels": np.array([classes.index(row["label"]) for row in rows]),
        "scores": np.array([row["probabilities"][classes[-1]] for row in rows]),
        "patients": np.array([row["patient_id"] for row in rows]),
        "classes": classes,
    }
    sections = tune_sections(results, summary, held_out)
    attention = attention_section(plan, rows, classes[-1])
    return sections + ([attention] if attention else [])


def cohort_facts(cohort: Cohort) -> dict[str, Any]:
    """What the report says of the slides."""
    return {
        "slides": len(cohort.slide_ids),
        "patients": len(set(cohort.patients)),
        "classes": ", ".join(cohort.classes),
    } | {f"{name} slides": len(indices) for name, indices in cohort.parts.items()}


def _write_predictions(folder: RunFolder, cohort: Cohort, answers: HeldOut) -> None:
    rows = []
    for place, i in enumerate(cohort.parts["test"]):
        rows.append(
            {
                "slide_id": cohort.slide_ids[i],
                "patient_id": cohort.patients[i],
                "label": cohort.classes[cohort.labels[i]],
                "probabilities": dict(
                    zip(cohort.classes, answers.probabilities[place].tolist(), strict=True)
                ),
                "attention": answers.attention[place].astype(float).round(6).tolist(),
                "tile_ids": list(cohort.tile_ids[i]),
            }
        )
    atomic_write_text(folder.path / "heldout.json", json.dumps(json_ready(rows)) + "\n")


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("tune")
