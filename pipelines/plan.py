"""`cytoray plan`: what a job would take and cost on a cluster, from a few slides really read."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cytoray.config import to_plain
from cytoray.errors import InputError, choose, raise_problems
from cytoray.io import atomic_write_text
from cytoray.nuclei import DETECTORS
from cytoray.planning import (
    DeviceRate,
    MeasureSettings,
    NodeGroup,
    SlideMeasure,
    Work,
    cache_line,
    flops_per_tile,
    forecast,
    forecast_lines,
    index_facts,
    measure_slide,
    parse_nodes,
    sample_slides,
    usable_rows,
)
from cytoray.planning.device import bound_rate, crop_flops, measure_encoder, measure_training
from cytoray.planning.nodes import gpu_model, total_cpus, total_gpus
from cytoray.progress import Progress, summary_table
from cytoray.slides import Grid, read_manifest
from cytoray.slides.remote import default_cache, is_remote
from cytoray.training import PretrainConfig
from pipelines.pretrain import Config as Pretrain
from pipelines.pretrain_report import crop_policy


@dataclass(frozen=True, kw_only=True)
class Config:
    """Say what indexing, pretraining or embedding would take, without starting it.

    Attributes:
        nodes: the cluster, groups of equal nodes: COUNTxCPUScpu[+GPUSxMODEL]@PRICE of one node an
            hour, separated by commas, e.g. 4x16cpu@0.35,2x96cpu+8xH200@33.6.
        manifest: CSV or Parquet as for `cytoray index`.
        index: folder written by `cytoray index`: its counts are used instead of guesses.
        job: what is planned.
        run: named pretraining run that is planned, e.g. unicas; empty: the defaults.
        method: SSL method, instead of the run's.
        backbone: timm name, instead of the run's; for `embed` the encoder.
        batch_size: tiles a step, instead of the run's.
        steps: optimiser steps, instead of the run's.
        epochs: passes over all tiles, instead of steps.
        sample: slides that are really opened.
        chunks_per_slide: chunks of 8 x 8 tiles read of each.
        tile_px: tile side in pixels at `mpp`; an index has its own.
        mpp: um/px of the tiles; an index has its own.
        detector: nuclei detector.
        keep_share: a tile is kept when at least this share of it is foreground.
        min_focus: tiles less sharp than this (0..1) are left out, as by `cytoray index`.
        min_nuclei: tiles with fewer nuclei are left out, as by `cytoray index`.
        trust_manifest_mpp: let the manifest's mpp overrule a file that contradicts it.
        gpu_tiles_per_s: tiles a second of one GPU, from a run or a benchmark.
        measure_step: measure that on this machine's device, a few steps long.
        measure_batch: tiles a step in that measurement.
        measure_steps: steps of that measurement.
        seed: of the sample.
        out: folder for plan.json.
    """

    nodes: str
    manifest: Path | None = None
    index: Path | None = None
    job: Literal["index", "pretrain", "embed"] = "pretrain"
    run: str = ""
    method: str | None = None
    backbone: str | None = None
    batch_size: int | None = None
    steps: int | None = None
    epochs: float | None = None
    sample: int = 16
    chunks_per_slide: int = 3
    tile_px: int = 224
    mpp: float = 0.5
    detector: str = "classical"
    keep_share: float = 0.02
    min_focus: float = 0.0
    min_nuclei: int = 0
    trust_manifest_mpp: bool = False
    gpu_tiles_per_s: float | None = None
    measure_step: bool = False
    measure_batch: int = 32
    measure_steps: int = 5
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        problems = _range_problems(self)
        if self.manifest is None and (self.index is None or self.job == "index"):
            problems.append("give --manifest" + ("" if self.job == "index" else " or --index"))
        leaves_out = self.min_nuclei > 0 or self.min_focus > 0
        if leaves_out and self.index is not None and self.job != "index":
            problems.append(
                "--min-nuclei and --min-focus: an index has left its tiles out already; give "
                "--manifest without --index to try others"
            )
        if self.min_nuclei > 0 and self.detector == "none":
            problems.append("--min-nuclei needs nuclei: choose a --detector other than none")
        if self.detector not in DETECTORS:
            problems.append(
                f"unknown detector {self.detector!r}; valid: {', '.join(sorted(DETECTORS))}"
            )
        if self.steps is not None and self.epochs is not None:
            problems.append("give --steps or --epochs, not both")
        if self.measure_step and self.gpu_tiles_per_s is not None:
            problems.append("give --gpu-tiles-per-s or --measure-step, not both")
        try:
            nodes = parse_nodes(self.nodes)
            if self.job != "index" and not total_gpus(nodes):
                problems.append(
                    f"--job {self.job} needs GPUs, --nodes {self.nodes} has none; e.g. add "
                    "1x96cpu+8xH200@33.6"
                )
            if self.job != "index" and total_cpus(nodes) <= total_gpus(nodes):
                problems.append("every GPU takes a CPU: none is left for reading")
        except InputError as error:
            problems += error.problems
        raise_problems("this cannot be planned:", problems)


def _range_problems(config: Config) -> list[str]:
    least = {
        "sample": (config.sample, 1),
        "chunks-per-slide": (config.chunks_per_slide, 1),
        "measure-batch": (config.measure_batch, 2),
        "measure-steps": (config.measure_steps, 1),
        "batch-size": (config.batch_size, 1),
        "steps": (config.steps, 1),
        "min-nuclei": (config.min_nuclei, 0),
    }
    above_zero = {"epochs": config.epochs, "gpu-tiles-per-s": config.gpu_tiles_per_s}
    return [
        *(f"--{k} must be {n} or more, not {v}" for k, (v, n) in least.items()
          if v is not None and v < n),
        *(f"--{k} must be above 0, not {v:g}" for k, v in above_zero.items()
          if v is not None and v <= 0),
        *([f"--min-focus must be from 0 to below 1, not {config.min_focus:g}"]
          if not 0 <= config.min_focus < 1 else []),
    ]  # fmt: skip


def run(config: Config) -> dict[str, Any]:
    """Sample slides, measure them, and print what the job would take."""
    began = time.perf_counter()
    nodes = parse_nodes(config.nodes)
    training = planned_training(config)
    rows, work, grid = _slides(config, training)
    needs_nuclei = config.job != "pretrain" or training.perturb.enabled
    detects = config.job == "index" or (needs_nuclei and not work.has_nuclei)
    detects = detects or config.min_nuclei > 0  # an index that leaves tiles out has looked for them
    settings = MeasureSettings(
        grid=grid,
        detector=config.detector if detects else "none",
        keep_share=config.keep_share,
        min_focus=config.min_focus,
        min_nuclei=config.min_nuclei,
        trust_manifest_mpp=config.trust_manifest_mpp,
        chunks_per_slide=config.chunks_per_slide,
        policy=crop_policy(training.ssl) if config.job == "pretrain" else None,
        perturb=training.perturb,
        seed=config.seed,
    )
    measured = _measure(rows, settings)
    rate = None if config.job == "index" else _gpu_rate(config, training.ssl, grid, nodes)
    result = forecast(measured, work, nodes, rate, seed=config.seed)
    summary = {
        "job": config.job,
        "nodes": [asdict(group) for group in nodes],
        "work": asdict(work),
        "sample": [asdict(slide) for slide in measured],
        "forecast": asdict(result),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if config.out is not None:
        text = json.dumps({"config": to_plain(config)} | summary, indent=2)
        atomic_write_text(config.out / "plan.json", text + "\n")
    lines = forecast_lines(result, work, measured, nodes)
    sizes = [m.file_bytes for m, row in zip(measured, rows, strict=True) if is_remote(row["path"])]
    if sizes:
        remote_bytes = work.num_slides * sum(sizes) / len(rows)
        lines["node cache"] = cache_line(remote_bytes, default_cache().max_bytes, config.job)
    if config.out is not None:
        lines["written"] = str(config.out / "plan.json")
    summary_table(f"plan: {config.job}; nothing was started", lines)
    return summary | {"exit_code": 0}


def planned_training(config: Config) -> Pretrain:
    """The pretraining that is planned: a named run with the config's changes.

    Raises:
        InputError: no such run, or changes that do not fit it.
    """
    from pipelines.runs import NAMED

    named = NAMED["pretrain"]
    planned: Pretrain = (
        named[choose("named run", config.run, named)]
        if config.run
        else Pretrain(index=Path("."), out=Path("."))
    )
    ssl = planned.ssl
    changes: dict[str, Any] = {
        "method": config.method,
        "batch_size": config.batch_size,
        "total_steps": config.steps,
    }
    if config.steps is not None:  # a short run has a short warm-up
        changes["optim"] = replace(
            ssl.optim, warmup_steps=min(ssl.optim.warmup_steps, config.steps - 1)
        )
    if config.backbone is not None:
        changes["backbone"] = replace(ssl.backbone, name=config.backbone)
    ssl = replace(ssl, **{k: v for k, v in changes.items() if v is not None})
    return replace(planned, ssl=ssl, workers=1)


def _slides(config: Config, training: Pretrain) -> tuple[list[dict[str, Any]], Work, Grid]:
    """The sample, and what there is to do; from the index where it has it."""
    work: dict[str, Any] = {
        "job": config.job,
        "steps": None if config.epochs is not None else training.ssl.total_steps,
        "epochs": config.epochs or 1.0,
        "batch_size": training.ssl.batch_size,
        "shuffle_chunks": training.shuffle_chunks,
    }
    if config.index is not None and config.job != "index":
        table = config.index / "slides.parquet"
        facts = index_facts(table)
        rows, _ = sample_slides(usable_rows(table), config.sample, config.seed)
        grid = Grid(tile_px=facts.tile_px, mpp=facts.mpp)
        work |= {
            "num_slides": facts.num_slides,
            "has_nuclei": facts.num_nuclei is not None,
            "known_tiles": facts.num_tiles,
            "known_nuclei": facts.num_nuclei,
            "known_quarantined": facts.num_quarantined / (facts.num_slides + facts.num_quarantined),
        }
        return rows, Work(tile_px=grid.tile_px, **work), grid
    assert config.manifest is not None
    manifest = read_manifest(config.manifest)
    rows, seen = sample_slides(manifest.rows.to_batches(4096), config.sample, config.seed)
    grid = Grid(tile_px=config.tile_px, mpp=config.mpp)
    return rows, Work(tile_px=grid.tile_px, num_slides=seen, **work), grid


def _measure(rows: list[dict[str, Any]], settings: MeasureSettings) -> list[SlideMeasure]:
    measured = []
    with Progress(f"plan: {len(rows)} slides are read") as progress:
        for row in rows:
            measured.append(measure_slide(row, settings))
            progress.update("sample", len(measured), len(rows), "slides")
    if all(slide.reason for slide in measured):
        raise_problems(
            "not one of the sampled slides can be used:",
            [f"{slide.slide_id}: {slide.message} [{slide.reason}]" for slide in measured],
        )
    return measured


def _gpu_rate(
    config: Config, ssl: PretrainConfig, grid: Grid, nodes: tuple[NodeGroup, ...]
) -> DeviceRate:
    if config.gpu_tiles_per_s is not None:
        return DeviceRate(tiles_per_s=config.gpu_tiles_per_s, source="given", what="as given")
    batch, steps = config.measure_batch, config.measure_steps
    if config.job == "embed":
        if config.measure_step:
            return measure_encoder(ssl.backbone.name, ssl.crops.global_px, batch, steps)
        return bound_rate(crop_flops(ssl.backbone.name, ssl.crops.global_px, ssl), gpu_model(nodes))
    if config.measure_step:
        return measure_training(ssl, grid.tile_px, batch, steps)
    return bound_rate(flops_per_tile(ssl), gpu_model(nodes))


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("plan")
