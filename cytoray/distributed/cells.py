"""Cell images and their frozen features, prepared once for all trials of a run."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from cytoray.distributed.pieces import Piece, run_pieces
from cytoray.errors import InputError, raise_problems
from cytoray.evaluation import Split
from cytoray.evaluation.baselines import load_features_model
from cytoray.finetune import Cells
from cytoray.finetune.data import CellData, prepare_cells
from cytoray.io import atomic_path
from cytoray.models.lora import check_lora
from cytoray.precision import autocast
from cytoray.progress import Progress
from cytoray.slides import quarantine_row, write_quarantine

BLOCK_IMAGES = 512
BATCH_IMAGES = 64


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


def facts_of_encoders(
    names: Sequence[str], pretrained: bool, lora_targets: Sequence[Sequence[str]] = ()
) -> dict[str, EncoderFacts]:
    """Load each encoder once to see that it is there, and that LoRA fits it.

    Args:
        names: forms `load_encoder` takes, or baselines.
        pretrained: published weights, else random ones.
        lora_targets: sets of targets that will be adapted.

    Raises:
        InputError: some cannot be had or adapted; all of them, see `load_encoder`.
    """
    found, problems = {}, []
    for name in dict.fromkeys(names):
        try:
            model = load_features_model(name, pretrained)
            for targets in lora_targets:
                check_lora(model.model, targets)
        except InputError as error:
            problems.append(str(error) if str(error).find(name) >= 0 else f"{name}: {error}")
            continue
        found[name] = EncoderFacts(
            name=name,
            encoder_id=model.encoder_id,
            img_px=model.spec.img_px,
            embed_dim=model.embed_dim,
        )
    raise_problems("these encoders cannot be used:", problems)
    return found


@lru_cache(maxsize=2)
def kept_model(name: str, pretrained: bool) -> Any:
    """An encoder or baseline, kept between the tasks of a worker process."""
    return load_features_model(name, pretrained)


@dataclass(frozen=True, kw_only=True)
class CellSettings:
    """What all trials on cell images share.

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


def gpus_of_task(asked: float | None) -> float:
    """GPUs of a task: as asked, else one where the cluster has any."""
    if asked is not None:
        return asked
    return 1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0


def prepare_images(
    cells: Cells,
    encoders: dict[str, EncoderFacts],
    out: Path,
    *,
    stage: str,
    split: Callable[[Cells], Split],
    progress: Progress,
    gpus: float,
    fit: str = "squash",
    pretrained: bool = True,
    features: bool = True,
    tracking_uri: str = "",
    extra: dict[str, Any] | None = None,
) -> tuple[CellSettings, int]:
    """Decode the images, quarantine those that cannot be read, split the rest, embed them.

    Args:
        cells: all images.
        encoders: by name.
        out: the run folder: `pixels/`, `features/` and `quarantine.parquet` go there.
        stage: the job's name in the quarantine.
        split: gives the parts of the readable images.
        progress: shown while it runs.
        gpus: of a task.
        fit: how an image becomes square.
        pretrained: published weights, else random ones.
        features: whether frozen features are needed.
        tracking_uri: MLflow.
        extra: kept with each adapter.

    Returns:
        what the trials share, and how many images could not be read.
    """
    data, bad = prepare_cells(
        cells, [facts.img_px for facts in encoders.values()], out / "pixels", fit=fit,
        on_progress=lambda done, total: progress.update("decode", done, total, "images"),
    )  # fmt: skip
    rows = [
        quarantine_row(cells.names[row], cells.paths[row], stage, code, message)
        for row, code, message in bad
    ]
    write_quarantine(rows, out / "quarantine.parquet")
    settings = CellSettings(
        data=data,
        split=split(data.cells),
        encoders=encoders,
        pretrained=pretrained,
        tracking_uri=tracking_uri,
        use_gpu=gpus > 0,
        fit=fit,
        extra=extra or {},
    )
    if features:
        known = features_of_cells(
            settings, out / "features", cpus=1.0, gpus=gpus,
            on_progress=lambda done, total: progress.update("features", done, total, "blocks"),
        )  # fmt: skip
        settings = replace(settings, encoders=known)
    return settings, len(bad)


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
    if not wanted:
        on_progress = None
    _, failed = run_pieces(
        pieces, _embed_block, settings, cpus=cpus, gpus=gpus, on_progress=on_progress
    )
    if failed:
        raise InputError("features could not be computed", sorted(set(failed.values())))
    for facts, path in wanted:
        parts = [Path(p.folder) for p in pieces if p.payload[0] == facts.name]
        with atomic_path(path) as draft:
            np.save(draft, np.concatenate([np.load(part / "features.npy") for part in parts]))
    shutil.rmtree(folder / "parts", ignore_errors=True)
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
    model = kept_model(name, settings.pretrained).to(device)
    images = settings.data.images(settings.encoders[name].img_px)
    parts = []
    for first in range(start, stop, BATCH_IMAGES):
        chosen = np.arange(first, min(first + BATCH_IMAGES, stop))
        batch = torch.from_numpy(images[chosen]).to(device)
        with autocast("auto", device):
            parts.append(model(batch).float().cpu().numpy())
    features = np.concatenate(parts)
    if not np.isfinite(features).all():
        raise InputError(f"encoder {name} gives features that are not finite")
    with atomic_path(Path(piece.folder) / "features.npy") as draft:
        np.save(draft, features)
    return {"images": len(features)}
