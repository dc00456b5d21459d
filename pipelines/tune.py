"""`cytoray tune`: a search over MIL aggregators, LoRA ranks and encoders, tracked in MLflow."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cytoray.config import to_plain
from cytoray.distributed.cluster import Need, check_fits, connect
from cytoray.distributed.prefixes import share_prefixes
from cytoray.distributed.search import TRIAL_MODULE, Halving, run_search
from cytoray.distributed.trials import unfinished
from cytoray.errors import InputError, raise_problems
from cytoray.mil import MILConfig
from cytoray.mil.selection import best_by_fold
from cytoray.progress import Progress, summary_table
from cytoray.report import write_report
from cytoray.runs import MAY_CHANGE, RunFolder
from cytoray.tracking import ChildRuns, open_tracker, patiently
from pipelines.embed import index_plan
from pipelines.tune_outcome import close_parent, register, summarise, test_chosen
from pipelines.tune_report import report_sections, write_results
from pipelines.tune_search import (
    child_runs,
    hide_paths,
    keep_space,
    plan_search,
    prepare,
    search_settings,
    trial_specs,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train heads in batch, choose by validation alone, test the chosen one on held-out slides.

    Attributes:
        bags: folders of bags written by `cytoray embed` (`.../bags`), one an encoder to compare.
        coarse_bags: the same slides by the same encoders at a coarser scale (larger tiles), in the
            order of `bags`, for aggregators of two scales (`less`); default: means of 2 x 2 tiles.
        index: folder written by `cytoray index`: labels, splits, patients, and the slides.
        out: folder of this run.
        encoder: the encoders that made the bags, in their order; trials with a LoRA rank adapt
            them. May be left out where all ranks are 0.
        label: label columns of the manifest; several are learnt at once, one task each, and may be
            missing for some slides.
        group: a further column that may not straddle training and test, e.g. the source image.
        aggregators: names to try.
        lora_ranks: ranks to try; 0 leaves the encoder frozen.
        lora_blocks: adapt the last so many blocks of the encoder; values to try; 0: all.
        lrs: learning rates of the aggregator to try; default: `mil.lr`.
        weight_decays: weight decays of the aggregator to try; default: `mil.weight_decay`.
        space: a YAML file with any fields of a trial and the values to try: lists, or ranges
            (`lr: {min: 1e-5, max: 1e-3, log: true}`); it wins over the flags above.
        search: try every combination, or `num_samples` at random.
        num_samples: of a random search.
        published: start from the learning rate, weight decay, ... each aggregator was published
            with.
        mil: everything else of a trial.
        lora_epochs: epochs end to end of trials with a LoRA rank; before them the head learns on
            the frozen features for `mil.epochs`.
        asha: end trials early that are worse than others of their fold at the same epoch.
        grace_epochs: epochs every trial gets before `asha` compares it.
        reduction: at each rung of `asha` one trial in so many goes on.
        folds: cross-validate by patient in so many folds, each held out once; 0: the manifest's
            `split`, or one split by fractions where it has none.
        val_fraction: share of the training patients held back to choose the epoch and the trial.
        test_fraction: share of the patients to test on, without folds and without `split`.
        calibrate: report probabilities after temperature scaling, fitted on validation slides.
        seed: of splits and random search.
        pretrained: for a timm encoder: published weights, else random ones.
        cpus_per_trial: CPUs of a trial; a fraction packs several on a core.
        gpus_per_trial: GPUs of a trial; a fraction packs several on one.
        max_concurrent: trials at a time; 0: as many as fit.
        prefix_gb: object store to keep the output of the encoders' frozen blocks in, for all
            trials with a LoRA rank; default: two fifths of it; 0: each trial computes it anew.
        model_name: name in the MLflow registry.
        tracking_uri: MLflow; default: a SQLite file in the working folder.
        tracking_wait_s: how long to wait at the end for an MLflow server that is away.
        experiment: MLflow experiment.
        dry_run: say what would be searched on what, and stop.
        resume: go on with the search in `out`; finished trials are not run again.
        address: a running Ray cluster; default: start one here.
    """

    bags: tuple[Path, ...]
    index: Path
    out: Path
    coarse_bags: tuple[Path, ...] = ()
    encoder: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)
    group: str = ""
    aggregators: tuple[str, ...] = ("mean", "abmil")
    lora_ranks: tuple[int, ...] = (0, 4)
    lora_blocks: tuple[int, ...] = (0,)
    lrs: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()
    space: Path | None = None
    search: Literal["grid", "random"] = "grid"
    num_samples: int = 20
    published: bool = False
    mil: MILConfig = field(default_factory=MILConfig)
    lora_epochs: int = 10
    asha: bool = False
    grace_epochs: int = 5
    reduction: float = 3.0
    folds: int = 0
    val_fraction: float = 0.25
    test_fraction: float = 0.25
    calibrate: bool = False
    seed: int = 0
    pretrained: bool = True
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    max_concurrent: int = 0
    prefix_gb: float | None = None
    model_name: str = "cytoray-head"
    tracking_uri: str = ""
    tracking_wait_s: float = 60.0
    experiment: str = "cytoray"
    dry_run: bool = False
    resume: bool = False
    address: str | None = None

    def __post_init__(self) -> None:
        lists = {
            "aggregators": self.aggregators,
            "lora-ranks": self.lora_ranks,
            "lora-blocks": self.lora_blocks,
            "label": self.label,
            "bags": self.bags,
        }
        shares = {"val-fraction": self.val_fraction, "test-fraction": self.test_fraction}
        counts = {"lora-epochs": self.lora_epochs, "num-samples": self.num_samples,
                  "grace-epochs": self.grace_epochs}  # fmt: skip
        problems = [f"--{name} needs a value" for name, given in lists.items() if not given]
        problems += [
            f"--{name} must be above 0 and below 1, not {share:g}"
            for name, share in shares.items()
            if not 0 < share < 1
        ]
        problems += [
            f"--{name} must be 1 or more, not {count}"
            for name, count in counts.items()
            if count < 1
        ]
        least = {"seed": self.seed, "max-concurrent": self.max_concurrent,
                 "tracking-wait-s": self.tracking_wait_s}  # fmt: skip
        problems += [
            f"--{name} must be 0 or more, not {value:g}"
            for name, value in least.items()
            if value < 0
        ]
        if self.folds < 0 or self.folds == 1:
            problems.append(f"--folds must be 0 (one split) or 2 and more, not {self.folds}")
        if self.reduction <= 1:
            problems.append(f"--reduction must be above 1, not {self.reduction:g}")
        if self.cpus_per_trial <= 0 or self.gpus_per_trial < 0:
            problems.append("--cpus-per-trial must be above 0, --gpus-per-trial 0 or more")
        if (self.prefix_gb or 0) < 0:
            problems.append(f"--prefix-gb must be 0 or more, not {self.prefix_gb:g}")
        if len(set(self.label)) < len(self.label):
            problems.append(f"--label names a column twice: {', '.join(self.label)}")
        # A named run leaves the paths open; they come as objects of the command line's own.
        if isinstance(self.bags, tuple) and len(self.coarse_bags) not in (0, len(self.bags)):
            problems.append(
                f"--coarse-bags must name one folder for each of the {len(self.bags)} --bags, not "
                f"{len(self.coarse_bags)}"
            )
        if isinstance(self.bags, tuple) and len(self.encoder) not in (0, len(self.bags)):
            problems.append(
                f"--encoder must name one encoder for each of the {len(self.bags)} --bags, not "
                f"{len(self.encoder)}"
            )
        raise_problems("this search cannot be run:", problems)


def run(config: Config) -> dict[str, Any]:
    """Run the search, choose by validation, evaluate the held-out slides, register the head."""
    began = time.perf_counter()
    search = prepare(config)
    if config.dry_run:
        return plan_search(config, search)
    opened = open_tracker(config.tracking_uri or None, config.experiment)
    # Ray keeps a process ready for each core: load it only where each core gets a trial.
    one_a_core = config.cpus_per_trial <= 1 and not (config.gpus_per_trial or config.max_concurrent)
    connect(config.address, preload=TRIAL_MODULE if one_a_core else "")
    check_fits(
        [Need(what="trial", count=1, cpus=config.cpus_per_trial, gpus=config.gpus_per_trial)],
        hint="ask for less --cpus-per-trial or --gpus-per-trial",
    )
    may_change = MAY_CHANGE | {"cpus_per_trial", "gpus_per_trial", "max_concurrent", "experiment",
                               "tracking_wait_s", "prefix_gb"}  # fmt: skip
    tracker = opened()  # before anything is written
    folder = RunFolder.open(config.out, "tune", to_plain(config), config.resume, may_change)
    keep_space(folder, search.candidates)
    run_id = tracker.start_run(
        f"tune {' '.join(config.label)}", params=to_plain(config),
        tags={"cytoray.job": "tune"}, key=folder.run_id,
    )  # fmt: skip
    specs = trial_specs(search, folder)
    settings = search_settings(config, search)
    children = ChildRuns(tracker, run_id, child_runs(search, folder))
    title = f"tune {len(specs)} trials on {len(search.cohort.slide_ids)} slides"
    with children, Progress(title) as progress:
        settings = share_prefixes(unfinished(specs), settings, progress, config.prefix_gb)
        results, failed = run_search(
            specs,
            settings,
            folder.path,
            progress=progress,
            max_concurrent=config.max_concurrent,
            halving=Halving(grace_epochs=config.grace_epochs, reduction=config.reduction)
            if config.asha
            else None,
            on_result=lambda result: _finish_child(children, result),
        )
        failed = hide_paths(failed, config.index)
        for key, text in failed.items():
            children.finish(key, "FAILED", tags={"cytoray.error": text[:500]})
        best = best_by_fold(results)
        untested = [spec.fold for spec in specs if spec.fold not in best]
        outcome = (
            None if untested else test_chosen(config, folder, search, specs, settings, results)
        )
        if outcome is not None and outcome.final is not None:
            _finish_child(children, outcome.final)
    behind = children.settle(config.tracking_wait_s)
    if outcome is None:
        patiently(lambda: tracker.end_run(run_id, "FAILED"), config.tracking_wait_s)
        where = f" of {untested[0]}" if untested[0] else ""
        raise InputError(f"every trial{where} failed", [f"{k}: {v}" for k, v in failed.items()])
    facts = {"failed": failed, "num_trials": len(specs), "mlflow_run_id": run_id,
             "mlflow_ui": tracker.ui_command(), "report": str(folder.report_path),
             "frozen_blocks": list(settings.prefix_notes)}  # fmt: skip
    summary = summarise(config, folder, search, outcome) | facts
    write_results(config, folder, search, outcome, summary, results)
    summary["registered_model"] = register(config, tracker, run_id, folder, search, summary)
    if behind or not summary["registered_model"]:
        print(f"MLflow at {tracker.uri} did not take everything; nothing is lost: run the same "
              "command with --resume once it is back")  # fmt: skip
    summary["seconds"] = round(time.perf_counter() - began, 1)
    folder.write_summary(summary)
    patiently(lambda: close_parent(tracker, run_id, folder), 0.0 if behind else 10.0)
    sections = report_sections(folder.path, index_plan(config.index))
    heading = f"Tuning {', '.join(config.label)}"
    write_report(folder.report_path, sections, heading, str(folder.path))
    hidden = ("heldout", "cohort", "classes", "rows", "tasks", "frozen_blocks")
    summary_table("tune", {k: v for k, v in summary.items() if k not in hidden})
    return summary


def _finish_child(children: ChildRuns, result: dict[str, Any]) -> None:
    metrics = {f"best_{name}": value for name, value in result["val"].items()}
    tags = {"cytoray.stopped": "early"} if result["stopped"] else {}
    children.finish(result["key"], "FINISHED", metrics, tags)


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("tune")
