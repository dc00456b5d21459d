"""`cytoray evaluate`: what frozen features tell, one encoder against another, with intervals."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cytoray.distributed.cells import facts_of_encoders, prepare_images
from cytoray.distributed.evaluate import ANSWERS, EvaluationSettings, evaluate_piece
from cytoray.distributed.pieces import Piece, run_pieces
from cytoray.errors import InputError, raise_problems
from cytoray.evaluation import METRICS, PROBES
from cytoray.evaluation.bag_features import bag_features, open_stores, read_labels
from cytoray.evaluation.protocol import MAPS, Examples, compare_encoders
from cytoray.finetune import FITS, Cells, Columns, predictions_frame, read_cells
from cytoray.finetune.data import check_shots, split_counts
from cytoray.io import atomic_path, atomic_write_text
from cytoray.plain import json_ready
from cytoray.progress import Progress, summary_table
from cytoray.report.evaluation_page import evaluate_sections
from cytoray.report.page import write_report
from cytoray.runs import MAY_CHANGE, RunFolder
from cytoray.slides import quarantine_row, write_quarantine
from cytoray.tracking import Tracker
from pipelines.cell_jobs import begin, class_lines, split_of
from pipelines.evaluate_report import curves_of, show, table_row

MAY_CHANGE_HERE = MAY_CHANGE | {"cpus_per_task", "gpus_per_task", "experiment", "strict"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Probe frozen encoders on labelled cell images, or on bags with labels of slides or tiles.

    Attributes:
        out: folder of this run.
        cells: labelled images: a folder with one folder per class, or a CSV.
        encoders: with `cells`: encoders as in `finetune`, and `colour-histogram` to compare with.
        bags: instead: folders of bags of `embed`, one for each encoder.
        labels: with `bags`: CSV or Parquet with slide_id or tile_id, label, group (patient), split.
        probes: `knn`, `linear`, `two_layer` (UniCAS), `simple_shot`.
        shots: examples of each class in the few-shot curves; none: no curves.
        shot_seeds: draws of each.
        shot_probes: probes of the curves.
        metric: by which encoders are compared.
        map_method: `tsne` or `pca`.
        attention_images: images whose attention is shown.
        num_draws: of the bootstrap.
        columns: columns of the CSV; `columns.group-pattern` finds groups in names of a folder.
        fit: how an image becomes square: squash, crop (its middle) or pad.
        val_fraction: share of the groups that chooses, where no split is given.
        test_fraction: share of the groups to test on, where no split is given.
        split_seed: of that split, the probes and the draws.
        pretrained: published weights, else random ones (`random:NAME` for one encoder).
        cpus_per_task: CPUs of a task.
        gpus_per_task: GPUs of a task that embeds; default: 1 where there are any.
        tracking_uri: MLflow; default: a SQLite file in the working folder.
        experiment: MLflow experiment.
        strict: exit with code 3 when an image could not be read or an example has no features.
        dry_run: say what would be run, and stop.
        resume: go on with the run in `out`; finished pieces are not done again.
        address: a running Ray cluster; default: start one here.
    """

    out: Path
    cells: Path | None = None
    encoders: tuple[str, ...] = ()
    bags: tuple[Path, ...] = ()
    labels: Path | None = None
    probes: tuple[str, ...] = ("knn", "linear", "two_layer", "simple_shot")
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    shot_seeds: tuple[int, ...] = (0, 1, 2)
    shot_probes: tuple[str, ...] = ("linear", "simple_shot")
    metric: str = "accuracy"
    map_method: str = "tsne"
    attention_images: int = 6
    num_draws: int = 1000
    columns: Columns = field(default_factory=Columns)
    fit: str = "squash"
    val_fraction: float = 0.15
    test_fraction: float = 0.25
    split_seed: int = 0
    pretrained: bool = True
    cpus_per_task: float = 1.0
    gpus_per_task: float | None = None
    tracking_uri: str = ""
    experiment: str = "cytoray"
    strict: bool = False
    dry_run: bool = False
    resume: bool = False
    address: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if (self.cells is None) == (not self.bags):
            problems.append("give either --cells or --bags")
        if self.cells is not None and not self.encoders:
            problems.append("--cells needs --encoders")
        if self.bags and self.labels is None:
            problems.append("--bags needs --labels")
        if not self.probes:
            problems.append("--probes needs a value")
        choices = [("probes", name, PROBES) for name in (*self.probes, *self.shot_probes)]
        choices += [("metric", self.metric, METRICS), ("map-method", self.map_method, MAPS)]
        choices += [("fit", self.fit, FITS)]
        problems += [
            f"--{flag} {name!r} is none of {', '.join(valid)}"
            for flag, name, valid in choices
            if name not in valid
        ]
        problems += [f"--shots {n} must be 1 or more" for n in self.shots if n < 1]
        fractions = (self.val_fraction, self.test_fraction)
        if min(fractions) <= 0 or sum(fractions) >= 1:
            problems.append("--val-fraction and --test-fraction must be above 0 and sum below 1")
        if self.attention_images < 0 or self.num_draws < 1:
            problems.append("--attention-images must be 0 or more, --num-draws 1 or more")
        if min(self.split_seed, *self.shot_seeds, 0) < 0:
            problems.append("--split-seed and --shot-seeds must be 0 or more")
        if self.cpus_per_task < 0 or (self.gpus_per_task or 0) < 0:
            problems.append("--cpus-per-task and --gpus-per-task must be 0 or more")
        raise_problems("this evaluation cannot be run:", problems)


def run(config: Config) -> dict[str, Any]:
    """Probe every encoder, compare them in pairs, and write results, table and page."""
    began = time.perf_counter()
    made = _cells_examples(config) if config.cells is not None else _bag_examples(config)
    examples, encoders, unlabelled, start = made
    check_shots(examples, examples.split, max(config.shots, default=0))
    if config.dry_run:
        return _plan(config, examples, encoders, unlabelled)
    begun = begin(
        "evaluate", config, (config.cells or config.bags[0]).stem, unit="task",
        cpus=config.cpus_per_task, gpus=config.gpus_per_task, may_change=MAY_CHANGE_HERE,
    )  # fmt: skip
    folder, tracker, run_id = begun.folder, begun.tracker, begun.run_id
    with Progress(f"evaluate {len(encoders)} encoders") as progress:
        if unlabelled:
            progress.note(f"{len(unlabelled)} rows have no label: {_first_few(unlabelled)}")
        settings, num_bad = start(folder, begun.gpus, progress)
        pieces = evaluation_pieces(config, encoders, folder.path)
        results, failed = run_pieces(
            pieces, evaluate_piece, settings, cpus=config.cpus_per_task,
            on_progress=lambda done, total: progress.update("pieces", done, total, "pieces"),
        )  # fmt: skip
    if not any(result["kind"] == "probe" for result in results):
        tracker.end_run(run_id, "FAILED")
        raise InputError("every probe failed", [f"{k}: {v}" for k, v in failed.items()])
    summary = _finish(config, folder, settings, pieces, results, failed, tracker, run_id)
    summary |= _unlabelled_facts(unlabelled) | {
        "num_left_out": num_bad,
        "seconds": round(time.perf_counter() - began, 1),
    }
    folder.write_summary(summary)
    tracker.log_artifact(run_id, folder.summary_path)
    tracker.end_run(run_id, "FINISHED")
    sections = evaluate_sections(folder.path, settings.examples, settings.cells)
    write_report(folder.report_path, sections, "Evaluation of encoders", str(folder.path))
    show(summary)
    return summary | {"exit_code": 3 if config.strict and num_bad else 0}


def _first_few(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def _unlabelled_facts(unlabelled: Sequence[str]) -> dict[str, Any]:
    """Of the rows that were not used for want of a label."""
    if not unlabelled:
        return {"num_unlabelled": 0}
    return {"num_unlabelled": len(unlabelled), "unlabelled": _first_few(unlabelled)}


def _plan(
    config: Config, examples: Examples, encoders: list[str], unlabelled: Sequence[str]
) -> dict[str, Any]:
    """What a run would do; the encoders have been loaded, so they are there."""
    pieces = evaluation_pieces(config, encoders, config.out)
    kinds = [piece.payload[0] for piece in pieces]
    plan = {
        "encoders": ", ".join(encoders),
        "examples": len(examples.names),
        "groups": len(set(examples.groups.tolist())),
        "pieces": ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
        "few-shot fits": kinds.count("few_shot") * len(config.shots) * len(config.shot_seeds),
        **_unlabelled_facts(unlabelled),
    }
    summary_table("evaluate would run", plan | class_lines(examples, examples.split))
    return plan


def _cells_examples(config: Config) -> tuple[Examples, list[str], tuple[str, ...], Any]:
    """Examples, encoders, rows without a label, and what embeds the images once the run began."""
    assert config.cells is not None
    cells = read_cells(config.cells, config.columns)
    examples = examples_of(config, cells)
    encoders = facts_of_encoders(config.encoders, config.pretrained)

    def start(folder: RunFolder, gpus: float, progress: Progress):
        shared, num_bad = prepare_images(
            cells, encoders, folder.path, stage="evaluate", progress=progress, gpus=gpus,
            split=lambda readable: split_of(config, readable), fit=config.fit,
            pretrained=config.pretrained,
        )  # fmt: skip
        settings = _settings(
            config,
            examples_of(config, shared.data.cells),
            {name: facts.features for name, facts in shared.encoders.items()},
        )
        return replace(settings, cells=shared), num_bad

    return examples, list(encoders), (), start


def _bag_examples(config: Config) -> tuple[Examples, list[str], tuple[str, ...], Any]:
    """The same for bags: their features are read, not made."""
    assert config.labels is not None
    labels = read_labels(config.labels, config.columns)
    cells, unit = labels.cells, labels.unit
    stores = open_stores(config.bags)
    made, missing = bag_features(list(stores.values()), cells, unit)
    keep = np.setdiff1d(np.arange(len(cells)), np.array(missing, dtype=np.int64))
    if not len(keep):
        there = ", ".join(next(iter(stores.values())).slide_ids[:3])
        raise InputError(
            f"not one {unit.removesuffix('_id')} of {config.labels} has features in all bags: the "
            f"table has {', '.join(cells.names[:3])}, ..., the bags are of {there}, ..."
        )
    kept = cells.without(missing)

    def start(folder: RunFolder, gpus: float, progress: Progress):
        files = {}
        for index, (name, features) in enumerate(zip(stores, made, strict=True)):
            path = folder.path / "features" / f"bags-{index}.npy"
            with atomic_path(path) as draft:
                np.save(draft, features[keep])
            files[name] = str(path)
        rows = [
            quarantine_row(
                cells.names[row],
                str(config.bags[0]),
                "evaluate",
                "no_features",
                f"{unit} {cells.names[row]} has a label and no features in the bags",
            )
            for row in missing
        ]
        write_quarantine(rows, folder.path / "quarantine.parquet")
        return _settings(config, examples_of(config, kept), files), len(missing)

    return examples_of(config, kept), list(stores), labels.unlabelled, start


def examples_of(config: Config, cells: Cells) -> Examples:
    """Labelled examples with their parts."""
    return Examples(
        names=cells.names,
        labels=cells.labels,
        classes=cells.classes,
        groups=cells.groups,
        split=split_of(config, cells),
    )


def _settings(config: Config, examples: Examples, features: dict[str, str]) -> EvaluationSettings:
    rng = np.random.default_rng(config.split_seed)
    shown = rng.permutation(examples.split.test)[: config.attention_images]
    return EvaluationSettings(
        examples=examples,
        features=features,
        shots=config.shots,
        shot_seeds=config.shot_seeds,
        shot_probes=config.shot_probes,
        map_method=config.map_method,
        num_draws=config.num_draws,
        seed=config.split_seed,
        images=tuple(sorted(shown.tolist())),
    )


def evaluation_pieces(config: Config, encoders: list[str], out: Path) -> list[Piece]:
    """Every probe, curve, map and attention of every encoder."""
    wanted = [("probe", encoder, probe) for encoder in encoders for probe in config.probes]
    if config.shots:
        wanted += [("few_shot", encoder, p) for encoder in encoders for p in config.shot_probes]
    wanted += [("map", encoder, config.map_method) for encoder in encoders]
    if config.cells is not None and config.attention_images:
        wanted += [("attention", encoder, "cls") for encoder in encoders]
    pieces = []
    for kind, encoder, what in dict.fromkeys(wanted):
        digest = hashlib.blake2b(encoder.encode(), digest_size=4).hexdigest()
        key = f"{kind}-{what}-{digest}"
        place = str(out / "pieces" / key)
        pieces.append(Piece(key=key, folder=place, payload=(kind, encoder, what)))
    return pieces


def _finish(
    config: Config,
    folder: RunFolder,
    settings: EvaluationSettings,
    pieces: list[Piece],
    results: list[dict[str, Any]],
    failed: dict[str, str],
    tracker: Tracker,
    run_id: str,
) -> dict[str, Any]:
    """`results.json`, `table.csv`, `predictions.csv`; the summary."""
    examples = settings.examples
    probes = [result for result in results if result["kind"] == "probe"]
    folders = {piece.payload: Path(piece.folder) for piece in pieces}
    answers = {
        (r["encoder"], r["probe"]): np.load(folders["probe", r["encoder"], r["probe"]] / ANSWERS)
        for r in probes
    }
    comparisons = compare_encoders(
        answers, examples, config.metric, n=config.num_draws, seed=config.split_seed
    )
    table = [table_row(result) for result in probes]
    curves = curves_of(results)
    frames = [
        predictions_frame(examples, examples.split.test, value, encoder=encoder, probe=probe)
        for (encoder, probe), value in answers.items()
    ]
    atomic_write_text(folder.path / "predictions.csv", pd.concat(frames).to_csv(index=False))
    pd.DataFrame(table).to_csv(folder.path / "table.csv", index=False)
    everything = {
        "metric": config.metric, "table": table, "probes": probes, "few_shot": curves,
        "comparisons": comparisons, "failed": failed,
        "pieces": {key: str(path.relative_to(folder.path)) for key, path in
                   ((" ".join(k), v) for k, v in folders.items())},
    }  # fmt: skip
    atomic_write_text(folder.path / "results.json", json.dumps(json_ready(everything)) + "\n")
    tracker.log_artifact(run_id, folder.path / "results.json")
    values = {
        f"{row['encoder']}/{row['probe']}/{metric}": row[metric]
        for row in table
        for metric in ("accuracy", "balanced_accuracy", "macro_f1", "auc")
        if row[metric] is not None
    }
    tracker.log_metrics(run_id, values)
    return {
        "encoders": list(settings.features),
        "classes": list(examples.classes),
        "num_examples": len(examples.names),
        "num_groups": len(set(examples.groups.tolist())),
        "parts": split_counts(examples, examples.split),
        "table": table,
        "few_shot": [point for point in curves if point["metric"] == config.metric],
        "comparisons": comparisons,
        "failed": failed,
        "unconverged": [
            f"{row['encoder']} {row['probe']} after {row['chosen']['unconverged']:.0f} steps"
            for row in probes
            if "unconverged" in row["chosen"]
        ],
        "metric": config.metric,
        "split_seed": config.split_seed,
        "attention_of": list(settings.images),
        "results": str(folder.path / "results.json"),
        "mlflow_run_id": run_id,
        "mlflow_ui": tracker.ui_command(),
        "report": str(folder.report_path),
    }


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("evaluate")
