"""A grid of MIL trials on Ray Tune: data shared by the trials, each finished one kept for good."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import tune

from cytoray.config import to_plain
from cytoray.distributed.cluster import Shared
from cytoray.distributed.embed import EncoderChoice
from cytoray.io import atomic_write_text
from cytoray.mil import (
    BagStore,
    LabelledBag,
    MILConfig,
    MILHead,
    MILResult,
    embed_tiles,
    load_head,
    predict,
    save_head,
    train_frozen,
    train_lora,
)
from cytoray.plain import json_ready
from cytoray.progress import Progress
from cytoray.streaming.plan import ReadPlan
from cytoray.streaming.tile_pixels import BagTiles
from cytoray.tracking import RunLogger

# Our own progress display stands for Tune's tables.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Labelled slides and their bags, read once and shared by the trials of a node.

    Attributes:
        slide_ids: N slides.
        labels: int64 (N,), index into `classes`.
        patients: N patient ids.
        parts: `train`, `val`, `test` -> int64 indices into the slides.
        classes: class names.
        features: (N_i, D) float16 of each slide.
        tile_ids: tile ids of each slide, in bag order.
        encoder_id: the encoder that made the features.
    """

    slide_ids: list[str]
    labels: np.ndarray
    patients: list[str]
    parts: dict[str, np.ndarray]
    classes: tuple[str, ...]
    features: list[np.ndarray]
    tile_ids: list[tuple[str, ...]]
    encoder_id: str

    def bags(self, part: str) -> list[LabelledBag]:
        """Bags of one part."""
        return [
            LabelledBag(self.slide_ids[i], self.features[i], int(self.labels[i]))
            for i in self.parts[part]
        ]

    def ids(self, part: str) -> list[str]:
        return [self.slide_ids[i] for i in self.parts[part]]


def read_features(store: BagStore, slide_ids: list[str]) -> tuple[list[np.ndarray], list[Any]]:
    """Features float16 and tile ids of the slides, in order."""
    bags = [store.read(slide_id, dtype=np.float16) for slide_id in slide_ids]
    return [bag.features for bag in bags], [bag.tile_ids for bag in bags]


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial: what it trains and where its result goes.

    Attributes:
        key: stable name, made of what the trial is.
        config: the trial.
        folder: its folder inside the run.
        run_id: its MLflow run.
    """

    key: str
    config: MILConfig
    folder: str
    run_id: str


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What all trials share.

    Attributes:
        cohort: the `Cohort`.
        plan: the `ReadPlan`; None without LoRA trials.
        encoder: the encoder LoRA trials adapt.
        tracking_uri: MLflow.
        cpus_per_trial, gpus_per_trial: resources of a trial.
        extra: kept with each head.
    """

    cohort: Shared
    plan: Shared | None
    encoder: EncoderChoice
    tracking_uri: str
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


def run_trial(spec: TrialSpec, settings: SearchSettings, on_epoch: Any = None) -> dict[str, Any]:
    """Train one trial, save its head, and write `result.json` last.

    Returns:
        `key`, `config`, `val` metrics, `best_epoch`, `history`, `seconds`, `run_id`.
    """
    began = time.perf_counter()
    device = torch.device(
        "cuda" if settings.gpus_per_trial and torch.cuda.is_available() else "cpu"
    )
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(settings.cpus_per_trial)))
    cohort: Cohort = settings.cohort.get()
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with RunLogger(settings.tracking_uri, spec.run_id, folder / "mlflow-pending.jsonl") as logger:

        def each_epoch(record: dict[str, float]) -> None:
            epoch = int(record["epoch"])
            logger.log({k: v for k, v in record.items() if math.isfinite(v)}, epoch)
            if on_epoch is not None:
                on_epoch(record)

        result = _train(spec.config, cohort, settings, each_epoch, device)
        logger.log({f"best_{k}": v for k, v in result.val_metrics.items() if v == v}, 0)
    save_head(
        folder / "head",
        result,
        classes=cohort.classes,
        encoder_id=cohort.encoder_id,
        encoder_name=settings.encoder.source,
        extra=settings.extra,
    )
    outcome = {
        "key": spec.key,
        "config": to_plain(spec.config),
        "val": result.val_metrics,
        "val_loss": _best(result, "val_loss"),
        "best_epoch": result.best_epoch,
        "history": result.history,
        "seconds": round(time.perf_counter() - began, 2),
        "run_id": spec.run_id,
    }
    atomic_write_text(folder / "result.json", json.dumps(json_ready(outcome), indent=1) + "\n")
    return outcome


def _best(result: MILResult, name: str) -> float:
    return next(r[name] for r in result.history if r["epoch"] == result.best_epoch)


def _train(
    config: MILConfig,
    cohort: Cohort,
    settings: SearchSettings,
    on_epoch: Any,
    device: torch.device,
) -> MILResult:
    classes = len(cohort.classes)
    if config.lora_rank == 0:
        return train_frozen(
            config, cohort.bags("train"), cohort.bags("val"), classes, on_epoch, device=device
        )
    return train_lora(
        config,
        settings.encoder.load(),
        tile_source(cohort, settings),
        cohort.ids("train"),
        cohort.labels[cohort.parts["train"]].tolist(),
        cohort.ids("val"),
        cohort.labels[cohort.parts["val"]].tolist(),
        classes,
        on_epoch,
        frozen_features=dict(zip(cohort.slide_ids, cohort.features, strict=True)),
        device=device,
    )


def tile_source(cohort: Cohort, settings: SearchSettings) -> BagTiles:
    """Tiles of the cohort's bags, read from the slides."""
    assert settings.plan is not None, "trials that adapt the encoder need the slides"
    plan: ReadPlan = settings.plan.get()
    names = {s: list(t) for s, t in zip(cohort.slide_ids, cohort.tile_ids, strict=True)}
    return BagTiles(plan, names)


def _trainable(config: dict[str, Any], settings: SearchSettings) -> None:
    def report(record: dict[str, float]) -> None:
        tune.report({"val_auc": record["val_auc"], "epoch": record["epoch"]})

    outcome = run_trial(config["spec"], settings, report)
    tune.report({"val_auc": outcome["val"]["auc"], "epoch": outcome["best_epoch"]})


class _ShowTrials:
    """Counts finished trials on the progress display, by the results they leave."""

    def __init__(self, progress: Progress, specs: list[TrialSpec]) -> None:
        self._progress, self._specs = progress, specs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> _ShowTrials:
        self._show()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show()

    def _follow(self) -> None:
        while not self._stop.wait(2.0):
            self._show()

    def _show(self) -> None:
        done = [result for spec in self._specs if (result := read_result(spec)) is not None]
        detail = ""
        if done:
            best = best_result(done)
            detail = f"best so far {best['key']}, val AUC {best['val'].get('auc') or 0:.3f}"
        self._progress.update("trials", len(done), len(self._specs), "trials", detail=detail)


def run_grid(
    specs: list[TrialSpec],
    settings: SearchSettings,
    out: Path,
    *,
    progress: Progress,
    max_concurrent: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Run every trial that has no result yet.

    Args:
        specs: the whole grid.
        settings: shared by the trials.
        out: the run folder.
        progress: shown while it runs.
        max_concurrent: trials at a time; 0: as many as the resources allow.

    Returns:
        results of all finished trials in grid order, and the message of each failed one by key.
    """
    todo = [spec for spec in specs if read_result(spec) is None]
    failed: dict[str, str] = {}
    if todo:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trainable, settings=settings),
                {"cpu": settings.cpus_per_trial, "gpu": settings.gpus_per_trial},
            ),
            param_space={"spec": tune.grid_search(todo)},
            tune_config=tune.TuneConfig(
                metric="val_auc", mode="max", max_concurrent_trials=max_concurrent or None
            ),
            run_config=tune.RunConfig(
                name=f"grid-{int(time.time())}",
                storage_path=str((out / "ray").resolve()),
                failure_config=tune.FailureConfig(max_failures=1),
                verbose=0,
            ),
        )
        with _ShowTrials(progress, specs):
            grid = tuner.fit()
        for i in range(len(grid)):
            error = grid[i].error
            if error is not None:
                lines = [line for line in str(error).strip().splitlines() if line.strip()]
                failed[grid[i].config["spec"].key] = lines[-1].strip()  # type: ignore[index]
    results = [read_result(spec) for spec in specs]
    return [r for r in results if r is not None], failed


def read_result(spec: TrialSpec) -> dict[str, Any] | None:
    """The result of a finished trial, or None."""
    path = Path(spec.folder) / "result.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def best_result(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial with the best validation AUC; on a tie, the lowest validation loss."""

    def rank(result: dict[str, Any]) -> tuple[float, float]:
        auc = result["val"].get("auc")
        return (-math.inf if auc is None else auc, -result["val_loss"])

    return max(results, key=rank)


@dataclass(frozen=True)
class HeldOut:
    """A head's answers on one part: (N, C) probabilities, and attention of each slide."""

    probabilities: np.ndarray
    attention: list[np.ndarray]


def predict_part(head_folder: Path, settings: SearchSettings, part: str) -> HeldOut:
    """Run a saved head on a part of the cohort, on the cluster."""
    task = ray.remote(_predict).options(
        num_cpus=settings.cpus_per_trial, num_gpus=settings.gpus_per_trial or None
    )
    return ray.get(task.remote(str(head_folder), settings, part))


def _predict(head_folder: str, settings: SearchSettings, part: str) -> HeldOut:
    cohort: Cohort = settings.cohort.get()
    head = load_head(head_folder)
    if head.lora_state:
        bags = _adapted_features(head, cohort, settings, part)
    else:
        bags = [bag.features for bag in cohort.bags(part)]
    answers = predict(head.aggregator, bags)
    return HeldOut(answers.probabilities, answers.attention)


def _adapted_features(
    head: MILHead, cohort: Cohort, settings: SearchSettings, part: str
) -> list[torch.Tensor]:
    """All tiles of the part's bags through the adapted encoder."""
    encoder = head.adapt(settings.encoder.load())
    encoder = encoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    source = tile_source(cohort, settings)
    return [
        embed_tiles(encoder, source, slide_id, np.arange(source.num_tiles(slide_id)))
        for slide_id in cohort.ids(part)
    ]
