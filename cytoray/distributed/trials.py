"""One trial of a search, in the process that trains it, and prediction with what it left.

Worker processes take trial after trial, and nothing here imports MLflow: a trial writes its
metrics to a file of its folder, from which the driver tells the tracking store.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytoray.config import to_plain
from cytoray.distributed.cluster import Shared
from cytoray.io import atomic_write_text
from cytoray.mil import (
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
from cytoray.mil.cohort import Cohort, FeatureSet
from cytoray.mil.folds import Fold
from cytoray.mil.prefix import FrozenPrefix
from cytoray.models.prefix import frozen_blocks
from cytoray.plain import json_ready
from cytoray.runs import read_events

# Bags in the object store are read-only, and nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

RESULT, METRICS = "result.json", "metrics.jsonl"
OnEpoch = Callable[[dict[str, float]], "bool | None"]


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial: what it trains on which fold, and where its result goes.

    Attributes:
        key: stable name, made of what the trial is.
        candidate: the configuration's name, the same on every fold.
        config: the configuration.
        encoder: which feature set it uses.
        fold: the fold's name.
        folder: its folder inside the run.
    """

    key: str
    candidate: str
    config: MILConfig
    encoder: int
    fold: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What all trials share.

    Attributes:
        cohort: the `Cohort`.
        folds: by name.
        features: a `FeatureSet` each, one an encoder.
        encoders: what LoRA trials adapt, one an encoder: a folder or a timm name; or empty.
        pretrained: for timm names: published weights, else random ones.
        plan: the `ReadPlan` of the slides; None without LoRA trials.
        cpus_per_trial, gpus_per_trial: resources of a trial.
        extra: kept with each head.
        prefixes: output of the frozen blocks by encoder and number of blocks; see
            `cytoray.distributed.prefixes`.
        prefix_notes: what was shared of them and what was not.
    """

    cohort: Shared
    folds: dict[str, Fold]
    features: tuple[Shared, ...]
    encoders: tuple[str, ...]
    pretrained: bool = True
    plan: Shared | None = None
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    prefixes: dict[tuple[int, int], FrozenPrefix] = field(default_factory=dict)
    prefix_notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        use_gpu = self.gpus_per_trial > 0 and torch.cuda.is_available()
        return torch.device("cuda" if use_gpu else "cpu")


@lru_cache(maxsize=2)
def load_encoder_once(source: str, pretrained: bool) -> Any:
    """An encoder, kept for the next trial of this process; it is copied before it is changed."""
    from cytoray.models.encoder import load_encoder

    return load_encoder(source, pretrained=pretrained)


class MetricsFile:
    """The metrics of a trial by epoch, one JSON line each, kept for the tracking store.

    An attempt that begins again writes on after the epochs that are there: the same trial gives
    the same numbers.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = {int(line["step"]) for line in read_events(path) if "step" in line}
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            with path.open("ab") as stream:  # the line a killed process left open
                stream.write(b"\n")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append one line; values that are not finite are left out."""
        if step in self._known:
            return
        values = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        record = {"step": step, "time_ms": int(time.time() * 1000), "metrics": values}
        with self._path.open("ab") as stream:
            stream.write(json.dumps(record).encode() + b"\n")


def run_trial(
    spec: TrialSpec, settings: SearchSettings, on_epoch: OnEpoch | None = None
) -> dict[str, Any]:
    """Train one trial, save its head, and write `result.json` last.

    Args:
        spec: the trial.
        settings: shared by the trials.
        on_epoch: sees each epoch's record; a true answer stops the trial.

    Returns:
        `key`, `candidate`, `fold`, `config`, `encoder`, `val` metrics, `val_loss`, `best_epoch`,
        `epochs`, `stopped`, `history`, `seconds`.
    """
    began = time.perf_counter()
    device = settings.device
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(settings.cpus_per_trial)))
    cohort: Cohort = settings.cohort.get()
    features: FeatureSet = settings.features[spec.encoder].get()
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics, stopped = MetricsFile(folder / METRICS), False

    def each_epoch(record: dict[str, float]) -> bool:
        nonlocal stopped
        metrics.log(record, int(record["epoch"]))
        stopped = bool(on_epoch(record)) if on_epoch is not None else False
        return stopped

    result = _train(spec, cohort, features, settings, each_epoch, device)
    save_head(
        folder / "head",
        result,
        classes=cohort.tasks,
        encoder_id=features.encoder_id,
        encoder_name=settings.encoders[spec.encoder] or features.name,
        extra=settings.extra,
    )
    outcome = {
        "key": spec.key,
        "candidate": spec.candidate,
        "fold": spec.fold,
        "encoder": features.name,
        "config": to_plain(spec.config),
        "val": result.val_metrics,
        "val_loss": next(r["val_loss"] for r in result.history if r["epoch"] == result.best_epoch),
        "best_epoch": result.best_epoch,
        "epochs": len(result.history),
        "stopped": stopped,
        "history": result.history,
        "seconds": round(time.perf_counter() - began, 3),
    }
    atomic_write_text(folder / RESULT, json.dumps(json_ready(outcome), indent=1) + "\n")
    return outcome


def _train(
    spec: TrialSpec,
    cohort: Cohort,
    features: FeatureSet,
    settings: SearchSettings,
    on_epoch: OnEpoch,
    device: torch.device,
) -> MILResult:
    fold, classes = settings.folds[spec.fold], cohort.task_classes
    if spec.config.lora_rank == 0:
        bags = features.bags(cohort, fold.train), features.bags(cohort, fold.val)
        return train_frozen(spec.config, *bags, classes, on_epoch, device=device)
    encoder = load_encoder_once(settings.encoders[spec.encoder], settings.pretrained)
    return train_lora(
        spec.config,
        encoder,
        tile_source(cohort, features, settings),
        cohort.ids(fold.train),
        [cohort.label(i) for i in fold.train],
        cohort.ids(fold.val),
        [cohort.label(i) for i in fold.val],
        classes,
        on_epoch,
        frozen_features=dict(zip(cohort.slide_ids, features.features, strict=True)),
        prefix=prefix_of(spec.encoder, encoder, spec.config, settings),
        device=device,
    )


def prefix_of(
    place: int, encoder: Any, config: MILConfig, settings: SearchSettings
) -> FrozenPrefix | None:
    """What is shared of the encoder's blocks below those that `config` adapts."""
    held = [depth for number, depth in settings.prefixes if number == place]
    depth = frozen_blocks(encoder, config.lora_blocks) if held else 0
    return settings.prefixes.get((place, depth))


def tile_source(cohort: Cohort, features: FeatureSet, settings: SearchSettings) -> Any:
    """Tiles of the cohort's bags, read from the slides."""
    from cytoray.streaming.tile_pixels import BagTiles

    assert settings.plan is not None, "trials that adapt the encoder need the slides"
    names = {s: list(t) for s, t in zip(cohort.slide_ids, features.tile_ids, strict=True)}
    return BagTiles(settings.plan.get(), names)


def read_result(folder: str | Path) -> dict[str, Any] | None:
    """The result of a finished trial, or None."""
    path = Path(folder) / RESULT
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def unfinished(specs: Sequence[TrialSpec]) -> list[TrialSpec]:
    """The trials without a result."""
    return [spec for spec in specs if read_result(spec.folder) is None]


@dataclass(frozen=True)
class HeldOut:
    """A head's answers on some slides.

    Attributes:
        logits: (N, C) of each task.
        attention: (N_i,) of each slide.
    """

    logits: tuple[np.ndarray, ...]
    attention: list[np.ndarray]


def predict_slides(
    head_folder: str, encoder: int, settings: SearchSettings, indices: np.ndarray
) -> HeldOut:
    """Run a saved head on slides of the cohort, in this process.

    Args:
        head_folder: written by a trial.
        encoder: the feature set it was trained on.
        settings: shared by the trials.
        indices: slides of the cohort.
    """
    cohort: Cohort = settings.cohort.get()
    features: FeatureSet = settings.features[encoder].get()
    head = load_head(head_folder)
    head.aggregator.to(settings.device)
    bags = features.bags(cohort, indices)
    if head.lora_state:
        views = _adapted_features(head, cohort, features, encoder, settings, indices)
    else:
        views = [bag.features for bag in bags]
    two_scales = head.aggregator.num_scales == 2 and bool(features.coarse) and not head.lora_state
    coarse = [bag.coarse for bag in bags if bag.coarse is not None] if two_scales else None
    answers = predict(head.aggregator, views, coarse)
    return HeldOut(answers.task_logits, answers.attention)


def _adapted_features(
    head: MILHead,
    cohort: Cohort,
    features: FeatureSet,
    encoder: int,
    settings: SearchSettings,
    indices: np.ndarray,
) -> Sequence[torch.Tensor]:
    """All tiles of the slides through the adapted encoder."""
    plain = load_encoder_once(settings.encoders[encoder], settings.pretrained)
    adapted = head.adapt(plain).to(settings.device).eval()
    source = tile_source(cohort, features, settings)
    prefix = prefix_of(encoder, plain, head.config, settings)
    return [
        embed_tiles(adapted, source, slide_id, np.arange(source.num_tiles(slide_id)), prefix=prefix)
        for slide_id in cohort.ids(indices)
    ]
