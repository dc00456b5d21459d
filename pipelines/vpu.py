"""`cytoray vpu`: an encoder learns from the labels of slides which of their tiles are benign."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cytoray.distributed.cluster import Shared
from cytoray.distributed.vpu import METRICS, VPUTask, run_extractor
from cytoray.errors import choose, raise_problems
from cytoray.mil.cohort import Cohort, read_cohort
from cytoray.mil.folds import Fold, final_fold, make_folds
from cytoray.mil.train_vpu import VPUConfig
from cytoray.progress import Progress, summary_table
from cytoray.runs import MAY_CHANGE
from cytoray.slides import merge_quarantine
from cytoray.tracking import patiently
from pipelines.cell_jobs import begin
from pipelines.embed import index_plan

MAY_CHANGE_HERE = MAY_CHANGE | {"cpus_per_task", "gpus_per_task", "experiment", "tracking_wait_s"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a tile encoder by variational positive-unlabelled learning, as LESS does.

    Tiles of slides with the class `positive` are labelled positive, those of all other slides
    unlabelled. The test slides of the manifest's `split` are not used.

    Attributes:
        index: folder written by `cytoray index`.
        encoder: where to start: a folder written by `cytoray pretrain`, or a name.
        out: folder of this run; the encoder is in its `encoder/`.
        label: label column of the manifest.
        positive: the class whose slides hold nothing else: benign.
        vpu: the training.
        val_fraction: share of the patients to choose the epoch by, where there is no `split`.
        split_seed: of that part.
        pretrained: for a name: published weights, else random ones.
        cpus_per_task: CPUs of the training.
        gpus_per_task: GPUs of the training; default: 1 where there are any.
        tracking_uri: MLflow; default: a SQLite file in the working folder.
        experiment: MLflow experiment.
        tracking_wait_s: how long to wait at the end for an MLflow server that is away.
        strict: exit with code 3 when a slide could not be read.
        resume: go on with the training in `out`, after its last whole epoch.
        address: a running Ray cluster; default: start one here.
    """

    index: Path
    encoder: str
    out: Path
    label: str = "label"
    positive: str = "0"
    vpu: VPUConfig = field(default_factory=VPUConfig)
    val_fraction: float = 0.25
    split_seed: int = 0
    pretrained: bool = True
    cpus_per_task: float = 1.0
    gpus_per_task: float | None = None
    tracking_uri: str = ""
    experiment: str = "cytoray"
    tracking_wait_s: float = 30.0
    strict: bool = False
    resume: bool = False
    address: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.val_fraction < 1:
            problems.append(f"--val-fraction must be above 0 and below 1, not {self.val_fraction}")
        if self.cpus_per_task < 0 or (self.gpus_per_task or 0) < 0:
            problems.append("--cpus-per-task and --gpus-per-task must be 0 or more")
        if self.split_seed < 0 or self.tracking_wait_s < 0:
            problems.append("--split-seed and --tracking-wait-s must be 0 or more")
        raise_problems("this training cannot be run:", problems)


def run(config: Config) -> dict[str, Any]:
    """Train on the index's slides and write the encoder."""
    began = time.perf_counter()
    cohort = read_cohort(config.index / "slides.parquet", [config.label], [])
    fold = _parts(config, cohort)
    plan = index_plan(config.index)
    begun = begin(
        "vpu", config, config.label, unit="task", cpus=config.cpus_per_task,
        gpus=config.gpus_per_task, may_change=MAY_CHANGE_HERE,
    )  # fmt: skip
    folder = begun.folder
    task = VPUTask(
        config=config.vpu,
        encoder=config.encoder,
        pretrained=config.pretrained,
        plan=Shared(plan),
        train=_kinds(config, cohort, fold.train),
        val=_kinds(config, cohort, fold.val),
        folder=str(folder.path.resolve()),
    )
    with Progress(f"vpu on {len(fold.train)} slides") as progress:
        done = run_extractor(task, cpus=config.cpus_per_task, gpus=begun.gpus, progress=progress)
    table = merge_quarantine(done["quarantine"], folder.path / "quarantine.parquet")
    summary = {
        "train_slides": len(fold.train),
        "val_slides": len(fold.val),
        "num_quarantined": table.num_rows,
        "best_epoch": done["best_epoch"],
        "val_loss": min(record["val_loss"] for record in done["history"]),
        "encoder": str(folder.path / "encoder"),
        "mlflow_run_id": begun.run_id,
        "seconds": round(time.perf_counter() - began, 1),
        "next": f"cytoray embed --index {config.index} --encoder {folder.path} --out EMBED",
    }
    folder.write_summary(summary)

    def send() -> bool:
        begun.tracker.log_lines(begun.run_id, (folder.path / METRICS).read_bytes())
        begun.tracker.log_artifact(begun.run_id, folder.summary_path)
        begun.tracker.end_run(begun.run_id, "FINISHED")
        return True

    if not patiently(send, config.tracking_wait_s):
        print(f"MLflow at {begun.tracker.uri} did not take the metrics; nothing is lost: run the "
              "same command with --resume once it is back")  # fmt: skip
    summary_table("vpu", summary)
    return summary | {"exit_code": 3 if config.strict and table.num_rows else 0}


def _parts(config: Config, cohort: Cohort) -> Fold:
    """Training and validation slides: the manifest's, or by patients at random.

    Raises:
        InputError: no such class, a split that leaks, or too few patients.
    """
    choose(f"class of {config.label}", config.positive, cohort.tasks[config.label])
    if any(cohort.split):
        options = {"split": cohort.split, "leak_columns": cohort.leak_columns, "folds": 0}
        [fold] = make_folds(
            cohort.labels, cohort.groups, val_fraction=config.val_fraction, test_fraction=0.0,
            seed=config.split_seed, **options,
        )  # fmt: skip
        return fold
    return final_fold(
        cohort.labels, cohort.groups, val_fraction=config.val_fraction, seed=config.split_seed
    )


def _kinds(config: Config, cohort: Cohort, part: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ids of the positive and of the other slides of a part."""
    positive = cohort.tasks[config.label].index(config.positive)
    is_positive = cohort.labels[part] == positive
    return tuple(cohort.ids(part[is_positive])), tuple(cohort.ids(part[~is_positive]))


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("vpu")
