"""Pretraining on Ray Train: what a worker does."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import get_device

from cytoray.config import to_plain
from cytoray.distributed.cluster import Share, Shared
from cytoray.distributed.dealer import start_dealer
from cytoray.distributed.stage_meter import (
    TRAIN,
    TRAINERS,
    Reporter,
    find_meter,
    meter_name,
)
from cytoray.distributed.tile_stream import TileBatch, TileStream
from cytoray.distributed.train_log import StreamMeter, TrainLog
from cytoray.errors import InputError, raise_problems
from cytoray.models.encoder import EncoderSpec
from cytoray.runs import RunFolder, config_changes
from cytoray.streaming import ChunkOrder, StreamPosition
from cytoray.streaming.tiles import TileReaderConfig
from cytoray.training import (
    BackgroundCheckpointer,
    CheckpointError,
    CollapseWatch,
    PretrainConfig,
    PretrainEngine,
    StepGuard,
    TrainingDiverged,
    encoder_spec,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from cytoray.training.costs import peak_flops

# What decides the shapes of a checkpoint's tensors.
_MODEL_PARTS = ("method", "backbone", "head", "crops")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Everything a training worker needs; plain values, sent to each of them.

    Attributes:
        ssl: the training step.
        reader: what is done to each tile.
        order: reading order.
        plan: the `ReadPlan`.
        share: CPUs of workers and readers.
        folder: the run folder, visible from every node.
        end_epoch: stop the stream after this many epochs.
        data: what the reading order hangs on; a resumed run must find the same.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: newest checkpoints kept.
        log_every: steps between logged metrics.
        tracking_uri, run_id: MLflow; no logging when `run_id` is empty.
        reserved_gpus: GPUs the workers hold together.
        packet_rows: tiles of one chunk that stay together in a batch.
        stop_on_collapse: end the run when the features collapse.
        deterministic: use deterministic kernels alone.
        log_tiles: write down the tile ids of every step.
        flops_per_tile: of a training step, for the rates that are logged; 0: unknown.
    """

    ssl: PretrainConfig
    reader: TileReaderConfig
    order: ChunkOrder
    plan: Shared
    share: Share
    folder: RunFolder
    end_epoch: int
    data: dict[str, Any]
    checkpoint_every: int
    keep_checkpoints: int = 3
    log_every: int = 10
    tracking_uri: str = ""
    run_id: str = ""
    reserved_gpus: float = 0.0
    packet_rows: int = 8
    stop_on_collapse: bool = False
    deterministic: bool = False
    log_tiles: bool = False
    flops_per_tile: int = 0


def train_loop(settings: LoopSettings) -> None:
    """One worker of the training group; returns when the run is complete.

    Starts again from the newest whole checkpoint of the run folder after any failure, at the exact
    tile the checkpoint stands at.
    """
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    log = TrainLog(
        settings.folder,
        rank,
        world,
        tracking_uri=settings.tracking_uri,
        run_id=settings.run_id,
        log_tiles=settings.log_tiles,
    )
    try:
        _Worker(settings, rank, world, log).train()
    except TrainingDiverged as error:
        log.event("stopped", step=error.step, error=str(error), tile_ids=list(error.tile_ids))
    except (InputError, CheckpointError) as error:
        # Starting again would only fail again: end the run and say why.
        log.event("stopped", step=-1, error=str(error))
    except Exception as error:
        log.event("failed", step=-1, error=f"{type(error).__name__}: {error}")
        raise
    finally:
        log.close()


class _Worker:
    """One rank: its engine, its place in the run, and the loop over its batches."""

    def __init__(self, settings: LoopSettings, rank: int, world: int, log: TrainLog) -> None:
        self.settings, self.log = settings, log
        self.device = get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(settings.share.worker_threads)
        if settings.deterministic:
            _be_deterministic()
        self.checkpoints = settings.folder.path / "checkpoints"
        # What dropout in a backbone draws from; a resumed run gets its state from the checkpoint.
        torch.manual_seed(settings.ssl.seed + rank)
        self.engine = PretrainEngine(settings.ssl, self.device, rank=rank, world_size=world)
        self.place, self.skipped = _restore(self.engine, self.checkpoints, settings)
        self.saved_at = self.place.step
        self.guard = StepGuard()
        self.collapse = CollapseWatch(start_step=settings.ssl.optim.warmup_steps)
        peak = peak_flops(self.device)
        self.meter = StreamMeter(settings.flops_per_tile, peak and peak * world)
        self.dealer = _dealer_name(settings, self.place.position, rank, world)

    def train(self) -> None:
        """Train to the end of the run and leave a last checkpoint."""
        settings = self.settings
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        reporter = Reporter(meter_name(settings.folder), TRAINERS)
        stream = TileStream(
            self.dealer,
            self.engine.rank,
            reporter=reporter,
            device_busy=lambda: done is not None and not done.query(),
        )
        start = {"step": self.place.step, "tiles": self.place.tiles, "attempt": self.dealer}
        self.log.event("start", **start, skipped_checkpoints=self.skipped)
        with BackgroundCheckpointer(
            self.checkpoints, encoder=_encoder_spec(settings), keep_last=settings.keep_checkpoints
        ) as saver:
            try:
                for batch in stream:
                    if self.place.step >= settings.ssl.total_steps:
                        break
                    self._step(batch, reporter)
                    if done is not None:
                        done.record()
                    if self.place.step % settings.checkpoint_every == 0:
                        self._save(saver)
                if self.saved_at != self.place.step:
                    self._save(saver)
            finally:
                stream.close()
                reporter.close()
        self.log.event(
            "end",
            step=self.place.step,
            tiles=self.place.tiles,
            epoch=self.place.position.epoch,
        )

    def _step(self, batch: TileBatch, reporter: Reporter) -> None:
        settings = self.settings
        metrics = self.engine.step(batch.columns, self.place.step)
        reporter.add(TRAIN, done=len(batch.columns["num_nuclei"]))
        self.meter.add(batch)
        self.place = place = self.place.after(batch)
        self.log.batch(self.dealer, place.step, batch)
        self.guard.add(place.step, metrics, batch.columns["tile_id"].tolist())
        if place.step == 1 or place.step % settings.log_every == 0:
            self._check()
            self.log.step(
                place.step,
                metrics,
                self.meter,
                tiles=float(place.tiles),
                epoch=float(place.position.epoch),
            )
            kind, message = self.collapse.update(metrics, place.step)
            if kind == "collapse" and settings.stop_on_collapse:
                raise InputError(message)
            if kind:
                self.log.event(kind, step=place.step, message=message)

    def _check(self) -> None:
        """Stop, with the state kept to look at, when a step since the last check went wrong."""
        try:
            self.guard.check()
        except TrainingDiverged as error:
            state = self._state() | {"tile_ids": list(error.tile_ids)}
            if self.engine.rank == 0:
                save_checkpoint(self.settings.folder.path / "diverged", error.step, state)
            raise

    def _save(self, saver: BackgroundCheckpointer) -> None:
        """Hand a checkpoint to the writer; all ranks stop when the one before was not written."""
        self._check()
        # All ranks: what is sharded is put together by all of them.
        state, weights = self._state(), self.engine.encoder_state_dict()
        problem = [""]
        if self.engine.rank == 0:
            try:
                saver.save(self.place.step, state, weights)
            except CheckpointError as error:
                problem = [str(error)]
        if self.engine.world_size > 1:
            torch.distributed.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise CheckpointError(problem[0])
        self.saved_at = self.place.step

    def _state(self) -> dict[str, Any]:
        return {
            "engine": self.engine.state_dict(),
            "place": to_plain(self.place),
            "data": self.settings.data,
        }


def _be_deterministic() -> None:
    """Kernels that give the same bits every time, at some cost in speed."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _encoder_spec(settings: LoopSettings) -> EncoderSpec:
    spec = encoder_spec(settings.ssl, mpp=settings.data["mpp"])
    return replace(spec, source={**spec.source, "tile_px": settings.data["tile_px"]})


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the run stands: steps and tiles done, and the position in the stream."""

    step: int = 0
    tiles: int = 0
    position: StreamPosition = field(default_factory=StreamPosition)

    def after(self, batch: TileBatch) -> _Place:
        return _Place(step=self.step + 1, tiles=self.tiles + batch.tiles, position=batch.after)


def _restore(
    engine: PretrainEngine, checkpoints: Path, settings: LoopSettings
) -> tuple[_Place, list[str]]:
    """Load the newest whole checkpoint, if there is one.

    Returns:
        Where the run stands, and the newer checkpoints that cannot be used.

    Raises:
        InputError: it was made on other data, or of another model.
    """
    found = latest_checkpoint(checkpoints, hashes=True)
    skipped = [str(passed_over) for passed_over in found.skipped]
    if found.checkpoint is None:
        return _Place(), skipped
    path = found.checkpoint.path
    state = load_checkpoint(path, hashes=False)
    changed = config_changes(state["data"], settings.data)
    raise_problems(
        f"{path} was made on another state of the index, so its position means nothing here; "
        "bring the index back, or start in another --out",
        [f"{name}: {old} -> {new}" for name, old, new in changed],
    )
    stored, now = state["engine"]["config"], to_plain(settings.ssl)
    parts = [{name: config[name] for name in _MODEL_PARTS} for config in (stored, now)]
    raise_problems(
        f"{path} holds another model than the one configured; undo these changes, or start in "
        "another --out",
        [f"ssl.{name}: {old} -> {new}" for name, old, new in config_changes(*parts)],
    )
    engine.load_state_dict(state["engine"])
    place = state["place"]
    position = StreamPosition(**place["position"])
    return _Place(step=place["step"], tiles=place["tiles"], position=position), skipped


def _dealer_name(settings: LoopSettings, position: StreamPosition, rank: int, world: int) -> str:
    """Rank 0 starts the dealer; the others learn its name."""
    names = [""]
    if rank == 0:
        meter = find_meter(meter_name(settings.folder))
        if meter is not None:  # tiles of the window that were used before are read again, not used
            meter.reset.remote({TRAIN: position.offset})
        source = {
            "plan": settings.plan,
            "order": settings.order,
            "config": settings.reader,
            "share": settings.share,
            "reserved_cpus": world * settings.share.cpus_per_worker,
            "reserved_gpus": settings.reserved_gpus,
            "meter": meter_name(settings.folder),
        }
        dealing = {
            "start": position,
            "end_epoch": settings.end_epoch,
            "batch_size": settings.ssl.batch_size,
            "world_size": world,
            "packet_rows": settings.packet_rows,
        }
        names = [start_dealer(source, dealing)]
    if world > 1:
        torch.distributed.broadcast_object_list(names, src=0)
    return names[0]
