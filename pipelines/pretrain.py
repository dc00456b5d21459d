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
from cytoray.distributed.pretrain import LoopSettings, run_training
from cytoray.distributed.watch import EventWatch
from cytoray.errors import InputError, choose, raise_problems
from cytoray.models.encoder import replace_folder
from cytoray.nuclei import DETECTORS
from cytoray.perturb import CROP_POLICIES, CropPolicy
from cytoray.progress import Progress, summary_table
from cytoray.report import write_report
from cytoray.report.sections import example_views, pretrain_section
from cytoray.runs import MAY_CHANGE, RunFolder
from cytoray.slides import iter_slide_table
from cytoray.streaming import ChunkOrder
from cytoray.streaming.plan import ReadPlan, plan_of_index
from cytoray.streaming.tiles import PerturbConfig, TileReaderConfig
from cytoray.tracking import Tracker
from cytoray.training import PretrainConfig, latest_checkpoint
from cytoray.training.costs import step_costs

_MAY_CHANGE = MAY_CHANGE | {
    "cpus_per_worker", "max_readers", "max_failures", "use_gpu", "checkpoint_every",
    "keep_checkpoints", "log_every", "experiment", "accumulate", "sharding", "compile",
    "pack_crops", "checkpoint_blocks",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretrain an encoder on the slides of an index, without labels.

    Attributes:
        index: folder written by `cytoray index`.
        out: folder of this run.
        ssl: method, backbone, crops, losses and schedules.
        perturb: nuclei-centred perturbation.
        nuclei: `table` takes the index's nuclei, `detect` finds them on the fly, `auto` takes the
            table when there is one.
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
        max_failures: worker failures the run survives by itself.
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
    max_failures: int = 3
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
        if self.workers >= 1 and self.ssl.batch_size % self.workers:
            problems.append(
                f"a batch of {self.ssl.batch_size} tiles cannot be shared equally by "
                f"{self.workers} workers; make --ssl.batch-size a multiple of {self.workers}"
            )
        raise_problems("this pretraining cannot be run:", problems)


def run(config: Config) -> dict[str, Any]:
    """Train to the end, or from the last checkpoint to the end, and export the encoder."""
    began = time.perf_counter()
    plan = read_plan(config)
    config, ssl, end_epoch = _settle_steps(config, plan)
    reader = _reader_config(config)
    connect(config.address)
    use_gpu, share = _fit_cluster(config)
    if config.dry_run:
        return _say(config, plan, ssl, share, use_gpu)
    folder = RunFolder.open(config.out, "pretrain", to_plain(config), config.resume, _MAY_CHANGE)
    done = folder.read_summary() if folder.resumed else None
    if done is not None:
        summary_table("pretrain: this run is complete", done)
        return done
    tracker = Tracker(config.tracking_uri or None, config.experiment)
    run_id = tracker.start_run(
        f"pretrain {ssl.method} {ssl.backbone.name}",
        params=to_plain(config),
        tags={"cytoray.job": "pretrain"},
        key=folder.run_id,
    )
    settings = LoopSettings(
        ssl=ssl,
        reader=reader,
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
    )
    with (
        Progress(f"pretrain {ssl.method} {ssl.backbone.name}") as progress,
        EventWatch(folder, progress, total_steps=ssl.total_steps),
    ):
        error = run_training(
            settings,
            workers=config.workers,
            use_gpu=use_gpu,
            max_failures=config.max_failures,
            name=f"pretrain-{folder.run_id[:8]}-{int(time.time())}",
        )
    tracker.end_run(run_id, "FAILED" if error else "FINISHED")
    if error:
        raise InputError(
            f"training stopped: {error}; the run is kept in {folder.path}, "
            "run the same command with --resume to go on from its last checkpoint"
        )
    return _finish(config, folder, tracker, run_id, plan, time.perf_counter() - began)


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


def _fit_cluster(config: Config) -> tuple[bool, Share]:
    resources = ray.cluster_resources()
    use_gpu = resources.get("GPU", 0) > 0 if config.use_gpu is None else config.use_gpu
    share = share_cpus(
        resources.get("CPU", 0),
        config.workers,
        cpus_per_worker=config.cpus_per_worker,
        max_readers=config.max_readers,
    )
    check_fits(
        [
            Need(what="training worker", count=config.workers, cpus=share.cpus_per_worker,
                 gpus=1.0 if use_gpu else 0.0),
            Need(what="tile reader", count=1, cpus=share.cpus_per_reader),
            Need(what="list of chunks", count=1, cpus=share.cpus_source),
        ],
        hint="ask for fewer --workers or --cpus-per-worker, or add nodes",
    )  # fmt: skip
    return use_gpu, share


def _reader_config(config: Config) -> TileReaderConfig:
    choose("nuclei source", config.nuclei, ("auto", "table", "detect"))
    choose("detector", config.detector, DETECTORS)
    has_table = _has_nuclei_table(config.index)
    if config.nuclei == "table" and not has_table:
        raise InputError(
            f"{config.index} has no nuclei table; run `cytoray index` with a --detector, or use "
            "--nuclei detect"
        )
    use_table = has_table and config.nuclei != "detect"
    if config.detector == "precomputed" and not use_table:
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
    )


def _has_nuclei_table(index: Path) -> bool:
    batches = iter_slide_table(index / "slides.parquet", ["num_nuclei"])
    return any(batch.column(0).null_count < batch.num_rows for batch in batches)


def _say(
    config: Config, plan: ReadPlan, ssl: PretrainConfig, share: Share, use_gpu: bool
) -> dict[str, Any]:
    epochs = ssl.total_steps * ssl.batch_size / plan.num_tiles
    summary = {
        "slides": plan.slides.num_rows,
        "tiles": plan.num_tiles,
        "steps": ssl.total_steps,
        "epochs": round(epochs, 2),
        "workers": f"{config.workers} x {'GPU' if use_gpu else f'{share.cpus_per_worker:g} CPU'}",
        "readers": f"{share.min_readers} to {share.max_readers} x {share.cpus_per_reader:g} CPU",
        "method": f"{ssl.method}, {ssl.backbone.name}",
        **_costs(config, ssl, use_gpu),
    }
    summary_table("pretrain: dry run, nothing was started", summary)
    return summary


def _costs(config: Config, ssl: PretrainConfig, use_gpu: bool) -> dict[str, Any]:
    """Parameters, work and memory of the run as the dry run prints them."""
    fp32 = ssl.precision == "fp32" or (ssl.precision == "auto" and not use_gpu)
    costs = step_costs(ssl, precision="fp32" if fp32 else "bf16")
    share = ssl.batch_size // config.workers
    flops = costs.flops_per_tile * ssl.batch_size * ssl.total_steps
    return {
        "parameters": f"{costs.num_parameters / 1e6:.1f} M trained, "
        f"{costs.num_backbone_parameters / 1e6:.1f} M of them the encoder",
        "work": f"{costs.flops_per_tile / 1e9:.1f} GFLOP a tile, {flops / 1e15:,.3g} PFLOP in all",
        "memory": f"at least {costs.memory_bytes(share) / 2**30:.1f} GiB a worker with {share} "
        f"tiles ({costs.state_bytes / 2**30:.1f} GiB of it weights and optimiser)",
        "hours": f"at least {flops / config.workers / 3.6e18:,.3g} where a worker sustains 1 "
        "PFLOP/s; `cytoray plan` measures your own",
    }


def _finish(
    config: Config,
    folder: RunFolder,
    tracker: Tracker,
    run_id: str,
    plan: ReadPlan,
    seconds: float,
) -> dict[str, Any]:
    found = latest_checkpoint(folder.path / "checkpoints")
    if found.checkpoint is None:
        raise InputError(f"training ended without a checkpoint in {folder.path / 'checkpoints'}")
    encoder = folder.path / "encoder"
    draft = folder.path / ".encoder.part"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(found.checkpoint.encoder, draft)
    replace_folder(draft, encoder)
    tracker.log_artifacts(run_id, encoder, "encoder")
    last = {}
    for event in folder.read_events():
        if event.get("event") == "step":
            last = event
    summary = {
        "steps": found.checkpoint.step,
        "loss": last.get("loss"),
        "tiles_per_s": last.get("tiles_per_s"),
        "wait_share": last.get("wait_share"),
        "num_slides": plan.slides.num_rows,
        "num_quarantined_tiles": _quarantined_tiles(folder.path),
        "encoder": str(encoder),
        "mlflow_run_id": run_id,
        "report": str(folder.report_path),
        "seconds": round(seconds, 1),
        "next": f"cytoray embed --index {config.index} --encoder {encoder} --out BAGS",
    }
    folder.write_summary(summary)
    section = pretrain_section(list(folder.read_events()), summary, example_picture(config, plan))
    write_report(folder.report_path, [section], "Pretraining", str(folder.path))
    summary_table("pretrain", summary)
    return summary


def example_picture(config: Config, plan: ReadPlan) -> bytes | None:
    """Some tiles as the model sees them; None without a nuclei table."""
    if not _has_nuclei_table(config.index):
        return None
    crops = config.ssl.crops
    return example_views(
        plan,
        config.index,
        crop_policy(config.ssl),
        radius_um=config.perturb.radius_um,
        retain_fraction=config.perturb.retain_fraction,
        global_px=crops.global_px,
        local_px=crops.local_px,
        seed=config.ssl.seed,
    )


def crop_policy(ssl: PretrainConfig) -> CropPolicy:
    """The method's crop policy with the configured numbers of crops."""
    return replace(
        CROP_POLICIES[ssl.method],
        num_global=ssl.crops.num_global,
        num_local=ssl.crops.num_local,
    )


def _quarantined_tiles(out: Path) -> int:
    lines = (line for path in out.glob("quarantine-rank*.jsonl") for line in path.open())
    return len(set(lines))


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("pretrain")
