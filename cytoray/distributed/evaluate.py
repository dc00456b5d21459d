"""The pieces of an evaluation as Ray tasks: a probe, a few-shot curve, a map, attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytoray.distributed.cells import CellSettings
from cytoray.distributed.pieces import Piece
from cytoray.evaluation.baselines import load_features_model
from cytoray.evaluation.protocol import (
    Examples,
    embedding_map,
    few_shot_examples,
    map_places,
    probe_examples,
    score_answers,
)
from cytoray.io import atomic_path
from cytoray.models.attention_maps import attention_of_images
from cytoray.models.encoder import Encoder

ANSWERS, POINTS, ATTENTION = "answers.npy", "map.npy", "attention.npy"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What all pieces share.

    Attributes:
        examples: labels, groups and parts.
        features: file of float32 (N, D) by encoder.
        shots, shot_seeds, shot_probes: of the few-shot curves.
        probe_options: options by probe.
        map_method: a name of `MAPS`.
        num_draws: of the bootstrap.
        seed: of everything random.
        images: places (K,) of the examples whose attention is shown.
        cells: where the images are; None for bags.
    """

    examples: Examples
    features: dict[str, str]
    shots: tuple[int, ...] = ()
    shot_seeds: tuple[int, ...] = (0, 1, 2)
    shot_probes: tuple[str, ...] = ("linear", "knn", "simple_shot")
    probe_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    map_method: str = "tsne"
    num_draws: int = 1000
    seed: int = 0
    images: tuple[int, ...] = ()
    cells: CellSettings | None = None

    def read_features(self, encoder: str) -> np.ndarray:
        """(N, D), mapped."""
        return np.load(self.features[encoder], mmap_mode="r")


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as draft:
        np.save(draft, array)


def _probe(piece: Piece, settings: EvaluationSettings) -> dict[str, Any]:
    _, encoder, probe = piece.payload
    answers, facts = probe_examples(
        probe,
        settings.read_features(encoder),
        settings.examples,
        seed=settings.seed,
        **settings.probe_options.get(probe, {}),
    )
    _save(Path(piece.folder) / ANSWERS, answers)
    scores = score_answers(answers, settings.examples, n=settings.num_draws, seed=settings.seed)
    return {"encoder": encoder, "probe": probe, "chosen": facts, **scores}


def _few_shot(piece: Piece, settings: EvaluationSettings) -> dict[str, Any]:
    _, encoder, probe = piece.payload
    runs = few_shot_examples(
        settings.read_features(encoder),
        settings.examples,
        probes=(probe,),
        shots=settings.shots,
        seeds=settings.shot_seeds,
        options=settings.probe_options,
    )
    return {"encoder": encoder, "probe": probe, "runs": runs}


def _map(piece: Piece, settings: EvaluationSettings) -> dict[str, Any]:
    _, encoder, method = piece.payload
    places = map_places(settings.examples.split, settings.seed)
    points = embedding_map(settings.read_features(encoder)[places], method, settings.seed)
    _save(Path(piece.folder) / POINTS, points)
    return {"encoder": encoder, "method": method, "points": len(points)}


@torch.inference_mode()
def _attention(piece: Piece, settings: EvaluationSettings) -> dict[str, Any]:
    _, encoder, _ = piece.payload
    assert settings.cells is not None, "attention is shown on images"
    model = load_features_model(encoder, settings.cells.pretrained)
    if not isinstance(model, Encoder):
        return {"encoder": encoder, "images": 0}
    images = settings.cells.data.images(model.spec.img_px)[np.array(settings.images)]
    maps = attention_of_images(model, torch.from_numpy(images))
    if maps is None:
        return {"encoder": encoder, "images": 0}
    _save(Path(piece.folder) / ATTENTION, maps.float().numpy())
    return {"encoder": encoder, "images": len(maps)}


KINDS: dict[str, Callable[[Piece, EvaluationSettings], dict[str, Any]]] = {
    "probe": _probe,
    "few_shot": _few_shot,
    "map": _map,
    "attention": _attention,
}


def evaluate_piece(piece: Piece, settings: EvaluationSettings) -> dict[str, Any]:
    """Do a piece whose payload is (kind, encoder, probe or method); its result has `kind`."""
    kind = piece.payload[0]
    return {"kind": kind, **KINDS[kind](piece, settings)}
