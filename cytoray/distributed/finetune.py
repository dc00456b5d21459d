"""Fine-tuning trials and frozen features of cell images as Ray tasks."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytoray.config import to_plain
from cytoray.distributed.pieces import Piece, run_pieces
from cytoray.errors import InputError
from cytoray.evaluation import CELL_METRICS, Split, evaluate_scores
from cytoray.evaluation.baselines import load_features_model
from cytoray.finetune import (
    AdapterFacts,
    CellTrial,
    TrainedCells,
    draw_examples,
    save_adapter,
    train_cells,
)
from cytoray.finetune.data import CellData
from cytoray.io import atomic_path
from cytoray.mil.tiles import precision_context
from cytoray.tracking import RunLogger

BLOCK_IMAGES = 512
TEST_ANSWERS = "test.npy"


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """What the driver has found out about an encoder.

    Attributes:
        name: the form it was given in.
        encoder_id: hash of its weights.
        img_px: side of the images it takes.
        embed_dim: width D.
        features: file of float32 (N, D), once they are computed.
    """

    name: str
    encoder_id: str
    img_px: int
    embed_dim: int
    features: str = ""


def encoder_facts(name: str, pretrained: bool) -> EncoderFacts:
    """Load an encoder to see that it is there.

    Raises:
        InputError: it cannot be had; see `load_encoder`.
    """
    model = load_features_model(name, pretrained)
    return EncoderFacts(
        name=name,
        encoder_id=model.encoder_id,
        img_px=model.spec.img_px,
        embed_dim=model.embed_dim,
    )


@lru_cache(maxsize=2)
def _model(name: str, pretrained: bool) -> Any:
    """Kept between the tasks of a worker process."""
    return load_features_model(name, pretrained)


@dataclass(frozen=True, kw_only=True)
class CellSettings:
    """What all trials share.

    Attributes:
        data: the images.
        split: their parts.
        encoders: by name.
        pretrained: published weights, else random ones.
        tracking_uri: MLflow.
        use_gpu: whether a task has a GPU.
        fit: how images were made square.
        extra: kept with each adapter.
    """

    data: CellData
    split: Split
    encoders: dict[str, EncoderFacts]
    pretrained: bool = True
    tracking_uri: str = ""
    use_gpu: bool = False
    fit: str = "squash"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Of a task."""
        return torch.device("cuda" if self.use_gpu and torch.cuda.is_available() else "cpu")


def features_of_cells(
    settings: CellSettings,
    folder: Path,
    *,
    cpus: float,
    gpus: float,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, EncoderFacts]:
    """Features of all images by every encoder, each computed once and kept in `folder`.

    Raises:
        InputError: an encoder that fails on the images.
    """
    pieces, wanted = [], []
    for facts in settings.encoders.values():
        path = _features_path(folder, settings.data, facts)
        if path.is_file():
            continue
        wanted.append((facts, path))
        for start in range(0, len(settings.data.cells), BLOCK_IMAGES):
            stop = min(start + BLOCK_IMAGES, len(settings.data.cells))
            part = f"{path.stem}-{start}"
            place = str(folder / "parts" / part)
            pieces.append(Piece(key=part, folder=place, payload=(facts.name, start, stop)))
    _, failed = run_pieces(
        pieces, _embed_block, settings, cpus=cpus, gpus=gpus, on_progress=on_progress
    )
    if failed:
        raise InputError("features could not be computed", sorted(set(failed.values())))
    for facts, path in wanted:
        parts = [Path(p.folder) for p in pieces if p.payload[0] == facts.name]
        with atomic_path(path) as draft:
            np.save(draft, np.concatenate([np.load(part / "features.npy") for part in parts]))
    return {
        name: replace(facts, features=str(_features_path(folder, settings.data, facts)))
        for name, facts in settings.encoders.items()
    }


def _features_path(folder: Path, data: CellData, facts: EncoderFacts) -> Path:
    """Named by the encoder, the pixel file and which of its rows are used."""
    seen = f"{data.pixels[facts.img_px].name}|{data.rows.tolist()}"
    digest = hashlib.blake2b(seen.encode(), digest_size=6).hexdigest()
    return folder / f"{facts.encoder_id}-{digest}.npy"


@torch.inference_mode()
def _embed_block(piece: Piece, settings: CellSettings) -> dict[str, Any]:
    name, start, stop = piece.payload
    device = settings.device
    model = _model(name, settings.pretrained).to(device)
    images = settings.data.images(settings.encoders[name].img_px)
    parts = []
    for first in range(start, stop, 64):
        batch = torch.from_numpy(images[np.arange(first, min(first + 64, stop))]).to(device)
        with precision_context("auto", device):
            parts.append(model(batch).float().cpu().numpy())
    features = np.concatenate(parts)
    if not np.isfinite(features).all():
        raise InputError(f"encoder {name} gives features that are not finite")
    with atomic_path(Path(piece.folder) / "features.npy") as draft:
        np.save(draft, features)
    return {"images": len(features)}


def trial_key(trial: CellTrial) -> str:
    """A name for people with a hash of all that the trial is: the same on resume."""
    text = json.dumps(to_plain(trial), sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in trial.encoder)
    encoder = safe[-40:].lstrip("-.")
    amount = f"{trial.shots}shots" if trial.shots else f"{100 * trial.share:g}pct"
    return f"{encoder}_{trial.adapter.name}_{amount}_lr{trial.lr:g}_s{trial.seed}_{digest}"


def trial_pieces(trials: Sequence[CellTrial], out: Path) -> list[Piece]:
    """A piece for each trial, in `out/trials`."""
    keys = [trial_key(trial) for trial in trials]
    return [
        Piece(key=key, folder=str(out / "trials" / key), payload=trial)
        for key, trial in zip(keys, trials, strict=True)
    ]


def run_cell_trial(piece: Piece, settings: CellSettings) -> dict[str, Any]:
    """Train one trial, keep its adapter and its answers on the test part, and give its result.

    Returns:
        what `cytoray.finetune.results` reads, with `history`, `seconds` and `run_id`.
    """
    began = time.perf_counter()
    trial: CellTrial = piece.payload
    cells, split, folder = settings.data.cells, settings.split, Path(piece.folder)
    facts = settings.encoders[trial.encoder]
    chosen = draw_examples(trial, cells.labels, cells.groups, split.train)
    pending = folder / "mlflow-pending.jsonl"
    with RunLogger(settings.tracking_uri, piece.run_id, pending) as logger:

        def note(record: dict[str, float]) -> None:
            finite = {k: v for k, v in record.items() if k != "step" and math.isfinite(v)}
            logger.log(finite, int(record["step"]))

        trained = train_cells(
            trial,
            _inputs(trial, settings, facts),
            cells.labels,
            chosen,
            split.val,
            split.test,
            len(cells.classes),
            encoder=_model(trial.encoder, settings.pretrained).cpu()
            if trial.adapter.needs_pixels
            else None,
            on_evaluation=note,
            device=settings.device,
        )
        test = evaluate_scores(cells.labels[split.test], trained.probabilities, CELL_METRICS)
        scores = {f"test_{k}": v for k, v in test.items() if math.isfinite(v)}
        scores |= {f"best_val_{k}": v for k, v in trained.val.items() if math.isfinite(v)}
        logger.log(scores, trained.best_step)
    _keep(folder, trial, trained, settings, facts)
    return {
        "key": piece.key,
        "encoder": trial.encoder,
        "adapter": trial.adapter.name,
        "amount": trial.amount,
        "shots": trial.shots,
        "share": trial.share,
        "lr": trial.lr,
        "seed": trial.seed,
        "num_images": trained.num_images,
        "num_trained": trained.num_trained,
        "val": trained.val,
        "test": test,
        "best_step": trained.best_step,
        "history": trained.history,
        "seconds": round(time.perf_counter() - began, 2),
        "run_id": piece.run_id,
        "pid": os.getpid(),
    }


def _inputs(trial: CellTrial, settings: CellSettings, facts: EncoderFacts) -> Any:
    """Pixels or frozen features, mapped from their file."""
    if trial.adapter.needs_pixels:
        return settings.data.images(facts.img_px)
    return np.load(facts.features, mmap_mode="r")


def _keep(
    folder: Path,
    trial: CellTrial,
    trained: TrainedCells,
    settings: CellSettings,
    facts: EncoderFacts,
) -> None:
    with atomic_path(folder / TEST_ANSWERS) as draft:
        np.save(draft, trained.probabilities.astype(np.float32))
    save_adapter(
        folder / "adapter",
        trained,
        AdapterFacts(
            encoder=trial.encoder,
            encoder_id=facts.encoder_id,
            adapter=trial.adapter,
            classes=settings.data.cells.classes,
            fit=settings.fit,
            pretrained=settings.pretrained,
            facts={"val": trained.val, "amount": trial.amount, **settings.extra},
        ),
    )


def read_answers(out: Path, key: str) -> np.ndarray:
    """A finished trial's probabilities (M, C) float64 on the test part; rows sum to 1."""
    answers = np.load(out / "trials" / key / TEST_ANSWERS).astype(np.float64)
    return answers / answers.sum(axis=1, keepdims=True)
