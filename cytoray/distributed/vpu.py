"""Training of a tile encoder from slide labels, as one task on the cluster."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from cytoray.distributed.cluster import Shared
from cytoray.distributed.trials import METRICS, MetricsFile
from cytoray.io import atomic_write_text
from cytoray.mil.train_vpu import VPUConfig, VPUTrainer
from cytoray.models.encoder import load_encoder, save_encoder
from cytoray.plain import json_ready
from cytoray.progress import Progress
from cytoray.slides.quarantine import row_from_error
from cytoray.streaming.tile_pixels import KeptTiles

STATE, RESULT = "state.pt", "vpu.json"


@dataclass(frozen=True, kw_only=True)
class VPUTask:
    """What the task is given.

    Attributes:
        config: the training.
        encoder: where it starts: a folder or a name.
        pretrained: for a name: published weights, else random ones.
        plan: the `ReadPlan` of the slides.
        train, val: ids of the positive and of the unlabelled slides.
        folder: of the run; `encoder/`, `metrics.jsonl` and the state are written there.
    """

    config: VPUConfig
    encoder: str
    pretrained: bool
    plan: Shared
    train: tuple[tuple[str, ...], tuple[str, ...]]
    val: tuple[tuple[str, ...], tuple[str, ...]]
    folder: str


def train_extractor(task: VPUTask) -> dict[str, Any]:
    """Train, save the encoder of the best epoch, and say how it went."""
    folder, plan = Path(task.folder), task.plan.get()
    encoder = load_encoder(task.encoder, pretrained=task.pretrained)
    trainer = VPUTrainer(
        task.config,
        encoder,
        KeptTiles(plan),
        task.train,
        task.val,
        state_path=folder / STATE,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    metrics = MetricsFile(folder / METRICS)
    result = trainer.run(lambda record: metrics.log(record, int(record["epoch"])))
    save_encoder(folder / "encoder", result.state_dict, encoder.spec)
    paths = dict(
        zip(*(plan.slides.column(n).to_pylist() for n in ("slide_id", "path")), strict=True)
    )
    outcome = {
        "best_epoch": result.best_epoch,
        "history": result.history,
        "quarantine": [
            row_from_error(name, paths[name], "vpu", error) for name, error in result.bad.items()
        ],
    }
    atomic_write_text(folder / RESULT, json.dumps(json_ready(outcome), default=str) + "\n")
    return outcome


def run_extractor(task: VPUTask, *, cpus: float, gpus: float, progress: Progress) -> dict[str, Any]:
    """`train_extractor` on the cluster, with its epochs on the display."""
    remote = ray.remote(train_extractor).options(
        num_cpus=cpus, num_gpus=gpus or None, max_retries=1
    )
    pending, path = [remote.remote(task)], Path(task.folder) / METRICS
    while pending:
        finished, pending = ray.wait(pending, timeout=1.0)
        done = len(path.read_bytes().splitlines()) - 1 if path.exists() else 0
        progress.update("epochs", max(0, done), task.config.epochs, "epochs")
        if finished:
            return ray.get(finished[0])
    raise AssertionError("a task ends with a result or an error")
