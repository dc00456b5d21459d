"""Pretraining on Ray Train: the call that starts the workers and says how they ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cytoray.distributed.stage_meter import meter_name, stage_meter
from cytoray.distributed.train_worker import LoopSettings, train_loop


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
