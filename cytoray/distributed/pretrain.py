"""Pretraining on Ray Train: the worker's loop, and the call that starts and watches it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from cytoray.config import to_plain
from cytoray.distributed.cluster import Share, Shared
from cytoray.distributed.dealer import start_dealer
from cytoray.distributed.stage_meter import (
    TRAIN,
    TRAINERS,
    Reporter,
    find_meter,
    meter_name,
    stage_meter,
)
from cytoray.distributed.tile_stream import TileBatch, TileStream
from cytoray.errors import InputError, raise_problems
from cytoray.runs import RunFolder
from cytoray.streaming import ChunkOrder, StreamPosition
from cytoray.streaming.tiles import TileReaderConfig
from cytoray.tracking import RunLogger
from cytoray.training import (
    BackgroundCheckpointer,
    CollapseWatch,
    PretrainConfig,
    PretrainEngine,
    TrainingDiverged,
    check_finite,
    encoder_spec,
    latest_checkpoint,
    load_checkpoint,
)


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


class _Meter:
    """Sums what the readers and the loop spent since the last log line."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.tiles = self.rows = self.without_nuclei = self.nuclei = 0
        self.wait_s = self.read_s = self.detect_s = self.perturb_s = 0.0
        self.began = time.perf_counter()

    def add(self, batch: TileBatch) -> None:
        columns = batch.columns
        self.tiles += batch.tiles
        self.rows += len(columns["num_nuclei"])
        self.nuclei += int(columns["num_nuclei"].sum())
        self.without_nuclei += int((columns["num_nuclei"] == 0).sum())
        self.wait_s += batch.wait_s
        for name in ("read_s", "detect_s", "perturb_s"):
            setattr(self, name, getattr(self, name) + float(columns[name].sum()))

    def summary(self) -> dict[str, float]:
        """Rates since `reset`; the `*_ms_per_tile` are CPU milliseconds of one reader."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        rows = max(self.rows, 1)
        return {
            "tiles_per_s": self.tiles / seconds,
            "wait_share": min(1.0, self.wait_s / seconds),
            "read_ms_per_tile": 1e3 * self.read_s / rows,
            "detect_ms_per_tile": 1e3 * self.detect_s / rows,
            "perturb_ms_per_tile": 1e3 * self.perturb_s / rows,
            "train_ms_per_tile": 1e3 * max(seconds - self.wait_s, 0.0) / max(self.rows, 1),
            "nuclei_per_tile": self.nuclei / rows,
            "no_nucleus_share": self.without_nuclei / rows,
        }


def train_loop(settings: LoopSettings) -> None:
    """One worker of the training group; returns when the run is complete.

    Starts again from the newest whole checkpoint of the run folder after any failure, at the exact
    tile the checkpoint stands at.
    """
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    writer = _Writer(settings, rank, world)
    try:
        _train(settings, rank, world, writer)
    except (InputError, TrainingDiverged) as error:
        # Starting again would only fail again: end the run and say why.
        writer.event("stopped", step=-1, error=str(error))
    except Exception as error:
        writer.event("failed", step=-1, error=f"{type(error).__name__}: {error}")
        raise
    finally:
        writer.close()


def _train(settings: LoopSettings, rank: int, world: int, writer: _Writer) -> None:
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, round(settings.share.cpus_per_worker)))
    engine = PretrainEngine(settings.ssl, device, rank=rank, world_size=world)
    checkpoints = settings.folder.path / "checkpoints"
    place, skipped = _restore(engine, checkpoints, settings.data)
    done = torch.cuda.Event() if device.type == "cuda" else None
    dealer = _dealer_name(settings, place.position, rank, world)
    reporter = Reporter(meter_name(settings.folder), TRAINERS)
    stream = TileStream(
        dealer, rank, reporter=reporter, device_busy=lambda: done is not None and not done.query()
    )
    watch = CollapseWatch(start_step=settings.ssl.optim.warmup_steps)
    meter = _Meter()
    saved_at = place.step
    writer.event("start", step=place.step, tiles=place.tiles, skipped_checkpoints=skipped)
    spec = encoder_spec(settings.ssl, mpp=settings.data["mpp"])
    spec = replace(spec, source={**spec.source, "tile_px": settings.data["tile_px"]})
    with BackgroundCheckpointer(
        checkpoints, encoder=spec, keep_last=settings.keep_checkpoints
    ) as saver:
        try:
            for batch in stream:
                if place.step >= settings.ssl.total_steps:
                    break
                writer.quarantine(batch)
                metrics = engine.step(batch.columns, place.step)
                if done is not None:
                    done.record()
                reporter.add(TRAIN, done=len(batch.columns["num_nuclei"]))
                meter.add(batch)
                place = place.after(batch)
                if place.step == 1 or place.step % settings.log_every == 0:
                    check_finite(metrics, place.step)
                    writer.step(place, metrics, meter)
                    message = watch.update(metrics, place.step)
                    if message and settings.stop_on_collapse:
                        raise InputError(message)
                    if message:
                        writer.event("collapse", step=place.step, error=message)
                if place.step % settings.checkpoint_every == 0:
                    _save(saver, engine, settings, place)
                    saved_at = place.step
            if saved_at != place.step:
                _save(saver, engine, settings, place)
        finally:
            stream.close()
            reporter.close()
    writer.event("end", step=place.step, tiles=place.tiles, epoch=place.position.epoch)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the run stands: steps and tiles done, and the position in the stream."""

    step: int = 0
    tiles: int = 0
    position: StreamPosition = field(default_factory=StreamPosition)

    def after(self, batch: TileBatch) -> _Place:
        return _Place(step=self.step + 1, tiles=self.tiles + batch.tiles, position=batch.after)


def _restore(
    engine: PretrainEngine, checkpoints: Path, data: dict[str, Any]
) -> tuple[_Place, list[str]]:
    """Load the newest whole checkpoint, if there is one.

    Raises:
        InputError: it was made on other data.
    """
    found = latest_checkpoint(checkpoints)
    skipped = [str(passed_over) for passed_over in found.skipped]
    if found.checkpoint is None:
        return _Place(), skipped
    state = load_checkpoint(found.checkpoint.path)
    changed = [
        f"{name}: {state['data'].get(name)} -> {value}"
        for name, value in data.items()
        if state["data"].get(name) != value
    ]
    raise_problems(
        f"{found.checkpoint.path} was made on another state of the index, so its position means "
        "nothing here; bring the index back, or start in another --out",
        changed,
    )
    engine.load_state_dict(state["engine"])
    place = state["place"]
    position = StreamPosition(**place["position"])
    return _Place(step=place["step"], tiles=place["tiles"], position=position), skipped


def _save(
    saver: BackgroundCheckpointer, engine: PretrainEngine, settings: LoopSettings, place: _Place
) -> None:
    # All ranks: what is sharded is put together by all of them.
    state = {
        "engine": engine.state_dict(),
        "place": to_plain(place),
        "data": settings.data,
    }
    weights = engine.encoder_state_dict()
    if engine.rank == 0:
        saver.save(place.step, state, weights)


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


class _Writer:
    """Events, metrics and quarantine lines of one worker; rank 0 speaks for all."""

    def __init__(self, settings: LoopSettings, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self._folder = settings.folder
        self._quarantine = settings.folder.path / f"quarantine-rank{rank}.jsonl"
        self._logger: RunLogger | None = None
        if rank == 0 and settings.run_id:
            pending = settings.folder.path / "mlflow-pending.jsonl"
            self._logger = RunLogger(settings.tracking_uri, settings.run_id, pending)

    def event(self, kind: str, **values: Any) -> None:
        if self._rank == 0 or kind in ("failed", "stopped"):
            self._folder.append_event(
                {"event": kind, "rank": self._rank, "world": self._world, "pid": os.getpid()}
                | values
            )

    def step(self, place: _Place, metrics: dict[str, torch.Tensor], meter: _Meter) -> None:
        if self._rank == 0:
            values = {name: float(value) for name, value in metrics.items()}
            values |= meter.summary()
            values |= {"tiles": float(place.tiles), "epoch": float(place.position.epoch)}
            self._folder.append_event({"event": "step", "step": place.step, **values})
            if self._logger is not None:
                self._logger.log(values, place.step)
        meter.reset()

    def quarantine(self, batch: TileBatch) -> None:
        if batch.invalid:
            with open(self._quarantine, "a", encoding="utf-8") as file:
                for tile_id, message in batch.invalid:
                    file.write(json.dumps({"tile_id": tile_id, "message": message}) + "\n")

    def close(self) -> None:
        if self._logger is not None:
            self._logger.close()


def run_training(
    settings: LoopSettings, *, workers: int, use_gpu: bool, max_failures: int, name: str
) -> str:
    """Run the worker group to the end; a worker that dies is replaced and the run goes on.

    Args:
        settings: sent to every worker.
        workers: size of the group; must divide `settings.ssl.batch_size`.
        use_gpu: one GPU for each worker (NCCL), else CPU (gloo).
        max_failures: restarts allowed.
        name: of the Ray Train run.

    Returns:
        Why it stopped before its end; empty when it is complete.
    """
    per_worker = {"CPU": settings.share.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})
    settings = replace(settings, reserved_gpus=float(workers if use_gpu else 0))
    began = sum(1 for _ in settings.folder.read_events())
    loop: Any = train_loop
    trainer = TorchTrainer(
        loop,
        train_loop_config=settings,  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker=per_worker
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=str(settings.folder.path / "ray"),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        with stage_meter(meter_name(settings.folder)):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        return _first_cause(error)
    events = list(settings.folder.read_events())[began:]
    return next((e["error"] for e in events if e.get("event") == "stopped"), "")


def _first_cause(error: BaseException) -> str:
    """The innermost message of a chain of Ray errors, on one line."""
    failures = getattr(error, "worker_failures", None)
    cause: BaseException = next(iter(failures.values())) if failures else error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__
