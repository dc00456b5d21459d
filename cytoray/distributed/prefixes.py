"""Activations of frozen blocks, computed once on the cluster and shared by the LoRA trials."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError

from cytoray.distributed.trials import SearchSettings, TrialSpec, load_encoder_once, tile_source
from cytoray.distributed.tuner import pool_size
from cytoray.errors import SlideError
from cytoray.mil.config import MILConfig
from cytoray.mil.prefix import FrozenPrefix, compute_prefix
from cytoray.mil.tiles import spread_indices
from cytoray.models.prefix import frozen_blocks, prefix_obstacle, tokens_shape
from cytoray.progress import Progress

STORE_SHARE = 0.4  # of the smallest node's object store; trials and bags need the rest
_BYTES = 2  # float16
_TASKS_A_SLOT = 4  # few, since each may load the encoder; several, since slides differ in size
Wanted = dict[str, np.ndarray]


class References:
    """Arrays of the object store by slide; read by the process that asks."""

    def __init__(self, references: Mapping[str, Any]) -> None:
        self._references = dict(references)

    def __call__(self, slide_id: str) -> np.ndarray:
        return ray.get(self._references[slide_id])


def share_prefixes(
    specs: Sequence[TrialSpec],
    settings: SearchSettings,
    progress: Progress,
    limit_gb: float | None = None,
) -> SearchSettings:
    """Settings with the output of the frozen blocks below the adapted ones, for all LoRA trials.

    One set for each encoder and depth, deepest first, as far as the memory goes: tiles of all
    slides where a trial trains on tiles as they are, else those it is evaluated on. What does not
    fit, or cannot be computed, each trial computes itself; `prefix_notes` say so.

    Args:
        specs: trials that will be run.
        settings: shared by the trials.
        progress: shown meanwhile.
        limit_gb: of the object store; None: `STORE_SHARE` of the smallest node's; 0: share nothing.
    """
    left = _store_bytes() * STORE_SHARE if limit_gb is None else limit_gb * 1e9
    groups, notes = _groups(specs, settings) if left > 0 else ({}, [])
    made: dict[tuple[int, int], FrozenPrefix] = {}
    for (place, depth), trials in sorted(groups.items(), key=lambda item: -item[0][1]):
        name = f"{settings.features[place].get().name}, {depth} frozen blocks"
        encoder = load_encoder_once(settings.encoders[place], settings.pretrained)
        tile_bytes = math.prod(tokens_shape(encoder)) * _BYTES
        choices = _choices(place, trials, settings)
        needs = [_num_tiles(choice) * tile_bytes for choice in choices]
        wanted = next((c for c, size in zip(choices, needs, strict=True) if size <= left), None)
        if wanted is None:
            notes.append(
                f"{name}: {min(needs) / 1e9:.2f} GB of object store are needed, "
                f"{left / 1e9:.2f} GB may be used: each of {len(trials)} trials computes their "
                "output anew (fewer --mil.eval-tiles, or more --prefix-gb)"
            )
            continue
        began = time.perf_counter()
        prefix, lost = _computed(place, depth, wanted, trials, settings, progress)
        size = _num_tiles(prefix.tiles) * tile_bytes
        left, made[place, depth] = left - size, prefix
        notes.append(
            f"{name}: output for {_num_tiles(prefix.tiles):,} tiles of {len(prefix.tiles)} slides "
            f"computed once in {time.perf_counter() - began:.1f} s, {size / 1e9:.3f} GB shared by "
            f"{len(trials)} trials{_lost_text(lost)}"
        )
    for note in notes:
        progress.note(note)
    return replace(settings, prefixes=made, prefix_notes=tuple(notes))


def _lost_text(lost: Mapping[str, str]) -> str:
    slides = ", ".join(f"{name} ({why})" for name, why in list(lost.items())[:3])
    return f"; not kept for {len(lost)} slides: {slides}" if lost else ""


def _groups(
    specs: Iterable[TrialSpec], settings: SearchSettings
) -> tuple[dict[tuple[int, int], list[TrialSpec]], list[str]]:
    """LoRA trials by encoder and number of frozen blocks, and which encoders cannot be cut."""
    groups: dict[tuple[int, int], list[TrialSpec]] = {}
    refused: dict[int, str] = {}
    for spec in specs:
        if not spec.config.lora_rank:
            continue
        encoder = load_encoder_once(settings.encoders[spec.encoder], settings.pretrained)
        obstacle = prefix_obstacle(encoder)
        if obstacle:
            refused[spec.encoder] = obstacle
            continue
        depth = frozen_blocks(encoder, spec.config.lora_blocks)
        groups.setdefault((spec.encoder, depth), []).append(spec)
    notes = [
        f"{settings.features[place].get().name}: every trial computes its frozen blocks anew: {why}"
        for place, why in refused.items()
    ]
    return groups, notes


def _choices(encoder: int, trials: Sequence[TrialSpec], settings: SearchSettings) -> list[Wanted]:
    """Tiles to hold, the most useful choice first."""
    cohort, features = settings.cohort.get(), settings.features[encoder].get()
    limits = sorted({spec.config.eval_tiles for spec in trials})
    folds = settings.folds.values()
    validation = sorted({int(i) for fold in folds for i in fold.val})
    training = sorted({int(i) for fold in folds for i in fold.train})
    counts = [len(names) for names in features.tile_ids]
    few = {
        cohort.slide_ids[i]: np.unique(
            np.concatenate([spread_indices(counts[i], limit) for limit in limits])
        )
        for i in validation
    }
    if all(spec.config.augment for spec in trials):
        return [few]
    every = {cohort.slide_ids[i]: np.arange(counts[i]) for i in {*training, *validation}}
    return [every, few]


def _num_tiles(wanted: Mapping[str, np.ndarray]) -> int:
    return sum(map(len, wanted.values()))


def _store_bytes() -> float:
    """Object store of the smallest node that has one."""
    sizes = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes()
             if node["Alive"]]  # fmt: skip
    return min((size for size in sizes if size), default=0.0)


def _computed(
    encoder: int,
    depth: int,
    wanted: Wanted,
    trials: Sequence[TrialSpec],
    settings: SearchSettings,
    progress: Progress,
) -> tuple[FrozenPrefix, dict[str, str]]:
    """Run the frozen blocks; a slide that cannot be read is left to the trials that need it."""
    shared, names = ray.put((settings, trials[0].config)), list(wanted)
    size = math.ceil(len(names) / (_TASKS_A_SLOT * pool_size(settings, 0)))
    task: Any = ray.remote(_prefix_of_slides)
    resources = {"num_cpus": settings.cpus_per_trial, "num_gpus": settings.gpus_per_trial or None}
    arrays, waiting = {}, {}
    for start in range(0, len(names), size):
        part = {name: wanted[name] for name in names[start : start + size]}
        task_of_part = task.options(num_returns=len(part) + 1, **resources)
        *made, reasons = task_of_part.remote(shared, encoder, part, depth)
        arrays |= dict(zip(part, made, strict=True))
        waiting[reasons] = list(part)
    lost: dict[str, str] = {}
    while waiting:
        for reasons in ray.wait(list(waiting), timeout=1.0)[0]:
            lost |= _outcome(reasons, waiting.pop(reasons))
        done = len(names) - sum(map(len, waiting.values()))
        progress.update("frozen blocks", done, len(names), "slides")
    kept = {name: tiles for name, tiles in wanted.items() if name not in lost}
    return FrozenPrefix(depth, kept, References({name: arrays[name] for name in kept})), lost


def _outcome(reasons: Any, slide_ids: list[str]) -> dict[str, str]:
    """Why slides of a task have no activations; empty if all have."""
    try:
        return ray.get(reasons)
    except RayError as error:
        return dict.fromkeys(slide_ids, type(error).__name__)


def _prefix_of_slides(
    shared: tuple[SearchSettings, MILConfig], encoder: int, wanted: Wanted, depth: int
) -> list[Any]:
    """Activations of some tiles of each slide (None where there are none), and last why not."""
    settings, config = shared
    if settings.device.type == "cpu":
        torch.set_num_threads(max(1, int(settings.cpus_per_trial)))
    model = load_encoder_once(settings.encoders[encoder], settings.pretrained)
    model = model.to(settings.device)
    source = tile_source(settings.cohort.get(), settings.features[encoder].get(), settings)
    made, reasons = [], {}
    for slide_id, indices in wanted.items():
        try:
            made.append(compute_prefix(
                model, source, slide_id, indices, depth,
                batch_tiles=config.batch_tiles, precision=config.precision,
            ))  # fmt: skip
        except SlideError as error:  # the trial that needs the slide tells the whole story
            made.append(None)
            reasons[slide_id] = error.code
        if made[-1] is None:
            reasons.setdefault(slide_id, "values beyond float16")
    return [*made, reasons]
