"""`cytoray pretrain`: stream nuclei-centred views of indexed slides into DINOv2 training."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from cytoray.config import to_plain
from cytoray.distributed.cluster import Need, Share, Shared, check_fits, connect, share_cpus
from cytoray.distributed.pretrain import run_training
from cytoray.distributed.probing import ProbeSettings, ProbeWatch, prepare_probe
from cytoray.distributed.train_worker import LoopSettings
from cytoray.distributed.watch import EventWatch
from cytoray.errors import InputError, choose, raise_problems
from cytoray.nuclei import DETECTORS
from cytoray.patience import PARTIAL, Patience, ReadTries
from cytoray.perturb import PerturbConfig
from cytoray.progress import Progress, summary_table
from cytoray.runs import MAY_CHANGE, RunFolder
from cytoray.streaming import ChunkOrder
from cytoray.streaming.plan import ReadPlan, has_nuclei_table, plan_of_index
from cytoray.streaming.tile_cache import TileCacheConfig, cache_key
from cytoray.streaming.tiles import TileReaderConfig
from cytoray.tracking import Tracker
from cytoray.training import PretrainConfig
from cytoray.training.config import normalisation
from cytoray.training.costs import step_costs
from pipelines.pretrain_report import (
    crop_policy,
    end_tracking,
    finish,
    probe_log,
    say,
    send_what_is_left,
)

_MAY_CHANGE = MAY_CHANGE | {
    "cpus_per_worker", "max_readers", "max_failures", "use_gpu", "checkpoint_every",
    "keep_checkpoints", "log_every", "experiment", "accumulate", "sharding", "compile",
    "pack_crops", "checkpoint_blocks", "cache_tiles", "probe_cells", "probe_every",
    "stop_on_collapse", "timeout_s", "max_tries", "log_tiles", "share_pictures",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretrain an encoder on the slides of an index, without labels.

    Attributes:
        index: folder written by `cytoray index`.
        out: folder of this run.
        ssl: method, backbone, crops, losses and schedules.
        perturb: Nuclei-Centred Perturbation; `--perturb.no-enabled` trains on plain crops.
        nuclei: `table` takes the index's nuclei, `detect` finds them on the fly, `auto` takes the
            table when there is one. Without the perturbation nothing is detected.
        detector: used when nuclei are detected on the fly.
        epochs: passes over all tiles; sets the number of steps instead of ssl.total-steps.
        shuffle_chunks: chunks whose tiles are mixed with each other; more mixes better and needs
            more shared memory.
        splits: slides of these splits are used (empty: all).
        workers: training workers; one GPU each where there are GPUs.
        use_gpu: train on GPUs; default: when the cluster has them.
        cpus_per_worker: CPUs of a training worker; default: 1, less on a small machine.
        max_readers: reading actors at most; default: as many as there are CPUs left.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: newest checkpoints kept.
        log_every: steps between logged metrics.
        timeout_s: seconds that opening a slide, or reading one of its chunks, may take before its
            reader is ended; 0: any time.
        max_tries: a slide whose reader died or was ended this often at one place is given up.
        max_failures: worker failures the run survives by itself.
        cache_tiles: GB of each node's disk (below CYTORAY_CACHE_DIR) for tiles and nuclei that were
            read; they are taken from there in later epochs. 0: slides are read in every epoch.
        probe_cells: labelled cell images, a folder per class or a CSV as for `cytoray evaluate`;
            the encoder is probed on them by kNN and logistic regression beside the training.
        probe_every: steps between probes, rounded up to checkpoints.
        stop_on_collapse: end the run when the features collapse, instead of only saying so.
        deterministic: the same bits every time for the same number of workers; slower on a GPU.
        log_tiles: write the tile ids of every step to `tiles-rank*.jsonl`.
        share_pictures: send sample views and attention maps to MLflow even when it is a server and
            not a file here; they show slide pixels.
        tracking_uri: MLflow; default: a SQLite file in the working folder.
        experiment: MLflow experiment.
        resume: go on with the run in `out`.
        address: a running Ray cluster; default: start one here.
        dry_run: say what would be done, and stop.
    """

    index: Path
    out: Path
    ssl: PretrainConfig = field(default_factory=PretrainConfig)
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    nuclei: str = "auto"
    detector: str = "classical"
    epochs: float | None = None
    shuffle_chunks: int = 16
    splits: tuple[str, ...] = ()
    workers: int = 1
    use_gpu: bool | None = None
    cpus_per_worker: float | None = None
    max_readers: int | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    log_every: int = 10
    timeout_s: float = 600.0
    max_tries: int = 2
    max_failures: int = 3
    cache_tiles: float = 0.0
    probe_cells: Path | None = None
    probe_every: int = 1000
    stop_on_collapse: bool = False
    deterministic: bool = False
    log_tiles: bool = False
    share_pictures: bool = False
    tracking_uri: str = ""
    experiment: str = "cytoray"
    resume: bool = False
    address: str | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        at_least_one = {
            "workers": self.workers,
            "shuffle-chunks": self.shuffle_chunks,
            "checkpoint-every": self.checkpoint_every,
            "keep-checkpoints": self.keep_checkpoints,
            "log-every": self.log_every,
            "probe-every": self.probe_every,
            "max-readers": 1 if self.max_readers is None else self.max_readers,
        }
        above_zero = {"epochs": self.epochs, "cpus-per-worker": self.cpus_per_worker}
        problems = [
            *(f"--{k} must be 1 or more, not {v}" for k, v in at_least_one.items() if v < 1),
            *(
                f"--{k} must be above 0, not {v:g}"
                for k, v in above_zero.items()
                if v is not None and v <= 0
            ),
        ]
        if self.cache_tiles < 0:
            problems.append(f"--cache-tiles must be 0 or more GB, not {self.cache_tiles:g}")
        if self.workers >= 1 and self.ssl.batch_size % self.workers:
            problems.append(
                f"a batch of {self.ssl.batch_size} tiles cannot be shared equally by "
                f"{self.workers} workers; make --ssl.batch-size a multiple of {self.workers}"
            )
        elif self.workers >= 1 and self.ssl.batch_size // self.workers < self.ssl.accumulate:
            problems.append(
                f"{self.workers} workers have {self.ssl.batch_size // self.workers} tiles each for "
                f"{self.ssl.accumulate} micro-batches; lower --ssl.accumulate"
            )
        raise_problems("this pretraining cannot be run:", problems)
        Patience(timeout_s=self.timeout_s, max_tries=self.max_tries)


def run(config: Config) -> dict[str, Any]:
    """Train to the end, or from the last checkpoint to the end, and export the encoder."""
    began = time.perf_counter()
    plan = read_plan(config)
    config, ssl, end_epoch = _settle_steps(config, plan)
    reader = _reader_config(config, plan)
    normalisation(ssl)  # says so if the weights to start from are not there
    connect(config.address)
    use_gpu, share = _share_of_cluster(config)
    if config.dry_run:
        summary = say(config, plan, ssl, share, use_gpu)
        _check_cluster(config, share, use_gpu)
        return summary
    _check_cluster(config, share, use_gpu)
    # Before anything is written; a complete run needs it no more
    tracker = None if config.resume else Tracker(config.tracking_uri or None, config.experiment)
    folder = RunFolder.open(config.out, "pretrain", to_plain(config), config.resume, _MAY_CHANGE)
    done = folder.read_summary() if folder.resumed else None
    if done is not None:
        send_what_is_left(config, folder, done["mlflow_run_id"])
        summary_table("pretrain: this run is complete", done)
        return done
    tracker = tracker or Tracker(config.tracking_uri or None, config.experiment)
    title = f"pretrain {ssl.method} {ssl.backbone.name}"
    run_id = tracker.start_run(
        title, params=to_plain(config), tags={"cytoray.job": "pretrain"}, key=folder.run_id
    )
    patience = Patience(timeout_s=config.timeout_s, max_tries=config.max_tries)
    settings = LoopSettings(
        ssl=ssl,
        reader=replace(
            reader, tries=ReadTries(folder=str(folder.path / PARTIAL), patience=patience)
        ),
        order=ChunkOrder(
            num_chunks=plan.num_chunks, seed=ssl.seed, shuffle_chunks=config.shuffle_chunks
        ),
        plan=Shared(plan),
        share=share,
        folder=folder,
        end_epoch=end_epoch,
        data=plan_facts(plan),
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        log_every=config.log_every,
        tracking_uri=tracker.uri,
        run_id=run_id,
        stop_on_collapse=config.stop_on_collapse,
        deterministic=config.deterministic,
        log_tiles=config.log_tiles,
        flops_per_tile=step_costs(ssl, precision="fp32").flops_per_tile,
    )
    probe = _probe(config, folder)
    probed = max((e["step"] for e in folder.read_events() if e["event"] == "probe"), default=-1)
    with (
        Progress(title) as progress,
        EventWatch(folder, progress, total_steps=ssl.total_steps),
        ProbeWatch(folder.path, probe, probe_log(folder, tracker, run_id), last_step=probed),
    ):
        error = run_training(
            settings,
            workers=config.workers,
            use_gpu=use_gpu,
            max_failures=config.max_failures,
            name=f"pretrain-{folder.run_id[:8]}-{int(time.time())}",
        )
    shutil.rmtree(folder.path / PARTIAL, ignore_errors=True)
    end_tracking(folder, tracker, run_id, failed=bool(error))
    if error:
        raise InputError(
            f"training stopped: {error}; the run is kept in {folder.path}, "
            "run the same command with --resume to go on from its last checkpoint"
        )
    return finish(config, folder, tracker, run_id, plan, time.perf_counter() - began)


def _probe(config: Config, folder: RunFolder) -> ProbeSettings | None:
    if config.probe_cells is None:
        return None
    return prepare_probe(
        config.probe_cells,
        config.ssl.crops.global_px,
        folder.path / "pixels",
        every=config.probe_every,
        seed=config.ssl.seed,
    )


def read_plan(config: Config) -> ReadPlan:
    """What there is to read, from the index.

    Raises:
        InputError: no index there, or no usable tile.
    """
    return plan_of_index(config.index, config.splits)


def plan_facts(plan: ReadPlan) -> dict[str, Any]:
    """What must be the same when a run is resumed, since its position counts on it."""
    return {
        "tile_px": plan.tile_px,
        "mpp": plan.mpp,
        "num_slides": plan.slides.num_rows,
        "num_chunks": plan.num_chunks,
        "num_tiles": plan.num_tiles,
    }


def _settle_steps(config: Config, plan: ReadPlan) -> tuple[Config, PretrainConfig, int]:
    """Steps from epochs or epochs from steps, and the epoch the stream ends with."""
    tiles, ssl = plan.num_tiles, config.ssl
    if config.epochs is not None:
        ssl = replace(ssl, total_steps=max(1, math.ceil(config.epochs * tiles / ssl.batch_size)))
        return replace(config, ssl=ssl), ssl, math.ceil(config.epochs)
    return config, ssl, math.ceil(ssl.total_steps * ssl.batch_size / tiles)


def _share_of_cluster(config: Config) -> tuple[bool, Share]:
    """Whether the workers train on GPUs, and how the CPUs are shared."""
    resources = ray.cluster_resources()
    use_gpu = resources.get("GPU", 0) > 0 if config.use_gpu is None else config.use_gpu
    share = share_cpus(
        resources.get("CPU", 0),
        config.workers,
        cpus_per_worker=config.cpus_per_worker,
        max_readers=config.max_readers,
    )
    return use_gpu, share


def _check_cluster(config: Config, share: Share, use_gpu: bool) -> None:
    check_fits(
        [
            Need(what="training worker", count=config.workers, cpus=share.cpus_per_worker,
                 gpus=1.0 if use_gpu else 0.0),
            Need(what="tile reader", count=1, cpus=share.cpus_per_reader),
            Need(what="list of chunks", count=1, cpus=share.cpus_source),
        ],
        hint="ask for fewer --workers or --cpus-per-worker, or add nodes",
    )  # fmt: skip


def _reader_config(config: Config, plan: ReadPlan) -> TileReaderConfig:
    choose("nuclei source", config.nuclei, ("auto", "table", "detect"))
    choose("detector", config.detector, DETECTORS)
    has_table = has_nuclei_table(config.index)
    if config.nuclei == "table" and not has_table:
        raise InputError(
            f"{config.index} has no nuclei table; run `cytoray index` with a --detector, or use "
            "--nuclei detect"
        )
    use_table = has_table and config.nuclei != "detect"
    if config.perturb.enabled and config.detector == "precomputed" and not use_table:
        raise InputError(
            "detector `precomputed` cannot find nuclei on the fly; run `cytoray index --detector "
            "precomputed --nuclei-dir DIR`, and pretrain with its table"
        )
    return TileReaderConfig(
        seed=config.ssl.seed,
        policy=crop_policy(config.ssl),
        perturb=config.perturb,
        nuclei_dir=str((config.index / "nuclei").resolve()) if use_table else "",
        detector=config.detector,
        cache=_tile_cache(config, plan, use_table),
    )


def _tile_cache(config: Config, plan: ReadPlan, use_table: bool) -> TileCacheConfig | None:
    """Tiles of this very index and choice of nuclei; another run on them finds them again."""
    if not config.cache_tiles:
        return None
    table = (config.index / "slides.parquet").resolve()
    stat = table.stat()
    source = "table" if use_table else config.detector if config.perturb.enabled else "none"
    key = cache_key(str(table), stat.st_size, stat.st_mtime_ns, plan_facts(plan), source,
                    config.splits)  # fmt: skip
    return TileCacheConfig(max_gb=config.cache_tiles, key=key)


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("pretrain")
