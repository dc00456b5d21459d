"""Fine-tuning trials as Ray tasks."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.config import to_plain
from cytoray.distributed.cells import CellSettings, EncoderFacts, kept_model
from cytoray.distributed.pieces import Piece
from cytoray.evaluation import CELL_METRICS, evaluate_scores
from cytoray.finetune import (
    AdapterFacts,
    CellTrial,
    TrainedCells,
    draw_examples,
    save_adapter,
    train_cells,
)
from cytoray.io import atomic_path
from cytoray.tracking import RunLogger

TEST_ANSWERS = "test.npy"


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
            encoder=kept_model(trial.encoder, settings.pretrained).cpu()
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
