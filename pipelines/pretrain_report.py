"""What a pretraining says of itself: the dry run beforehand, pictures and report afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from cytoray.device_peaks import peak_of_device, try_cpu
from cytoray.distributed.cluster import Share
from cytoray.distributed.train_log import pending_metrics
from cytoray.errors import InputError
from cytoray.models.encoder import replace_folder
from cytoray.perturb import CROP_POLICIES, CropPolicy
from cytoray.precision import resolve_precision
from cytoray.progress import duration, summary_table
from cytoray.report import write_report
from cytoray.report.pretraining import example_attention, example_views, pretrain_section
from cytoray.runs import RunFolder
from cytoray.streaming.plan import ReadPlan, has_nuclei_table
from cytoray.streaming.quarantine import quarantine_facts
from cytoray.tracking import Tracker, keep_going, send_pending
from cytoray.training import PretrainConfig, encoder_spec, latest_checkpoint
from cytoray.training.costs import step_costs
from cytoray.training.sharding import resolve_sharding

if TYPE_CHECKING:
    from pipelines.pretrain import Config as Pretrain


def say(
    config: Pretrain, plan: ReadPlan, ssl: PretrainConfig, share: Share, use_gpu: bool
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
        **_costs(config, ssl, share, use_gpu),
    }
    summary_table("pretrain: dry run, nothing was started", summary)
    return summary


def _costs(config: Pretrain, ssl: PretrainConfig, share: Share, use_gpu: bool) -> dict[str, Any]:
    """Parameters, work, memory and time of the run as the dry run prints them."""
    precision = ssl.precision
    if precision == "auto":  # a GPU may be on another machine
        precision = "bf16" if use_gpu else resolve_precision(precision, torch.device("cpu"))
    costs = step_costs(ssl, precision=precision)
    if use_gpu:
        per_worker, of_what = _gpu_peak(ray.cluster_resources())
    else:
        threads = share.worker_threads
        per_worker = try_cpu(precision, threads)
        of_what = f"the {per_worker / 1e9:,.0f} GFLOP/s of a product here (threads: {threads})"
    at_once = -(-ssl.batch_size // (config.workers * ssl.accumulate))
    spec = encoder_spec(ssl)
    sharding = resolve_sharding(
        ssl,
        world_size=config.workers,
        embed_dim=spec.embed_dim,
        is_transformer=spec.patch_px > 0,
    )
    shards = config.workers if sharding == "fsdp" else 1
    flops = costs.flops_per_tile * ssl.batch_size * ssl.total_steps
    seconds = flops / config.workers / per_worker
    hours = seconds / 3600
    return {
        "parameters": f"{costs.num_parameters / 1e6:.1f} M trained, "
        f"{costs.num_backbone_parameters / 1e6:.1f} M of them the encoder",
        "work": f"{costs.flops_per_tile / 1e9:.1f} GFLOP a tile, {flops / 1e15:,.3g} PFLOP in all",
        "memory": f"at least {costs.memory_bytes(at_once, shards) / 2**30:.1f} GiB a worker with "
        f"{at_once} tiles at once ({costs.state_bytes / shards / 2**30:.1f} GiB of it weights and "
        "optimiser)",
        "hours": f"at least {hours:,.{0 if hours >= 10 else 2}f} ({duration(seconds)}) if a worker "
        f"sustained {of_what}; `cytoray plan` measures your own",
    }


def _gpu_peak(resources: Mapping[str, float]) -> tuple[float, str]:
    """FLOP/s of the fastest kind of GPU that a cluster with these resources says it has."""
    kinds = (name.removeprefix("accelerator_type:") for name in resources)
    peaks = {kind: peak for kind in kinds if (peak := peak_of_device(kind)) is not None}
    if not peaks:
        return 1e15, "1 PFLOP/s"
    fastest = max(peaks, key=peaks.__getitem__)
    return peaks[fastest], f"the {peaks[fastest] / 1e12:,.0f} TFLOP/s of {fastest}"


def pictures(config: Pretrain, plan: ReadPlan, encoder: Path) -> dict[str, bytes]:
    """Some tiles as the model sees them, and where its encoder looks.

    Cellpose would take minutes here, without a GPU: where it alone knows the nuclei, no views.

    Args:
        config: of the run.
        plan: what was read.
        encoder: folder of the trained encoder.
    """
    crops = config.ssl.crops
    nuclei_dir = config.index / "nuclei" if has_nuclei_table(config.index) else None
    found: dict[str, bytes | None] = {}
    if nuclei_dir is not None or not config.perturb.enabled or config.detector != "cellpose":
        found["views"] = example_views(
            plan,
            nuclei_dir,
            crop_policy(config.ssl),
            perturb=config.perturb,
            detector=config.detector,
            global_px=crops.global_px,
            local_px=crops.local_px,
            seed=config.ssl.seed,
        )
    found["attention"] = example_attention(plan, nuclei_dir, encoder, seed=config.ssl.seed)
    return {name: image for name, image in found.items() if image is not None}


def crop_policy(ssl: PretrainConfig) -> CropPolicy:
    """The method's crop policy with the configured numbers of crops."""
    return replace(
        CROP_POLICIES[ssl.method],
        num_global=ssl.crops.num_global,
        num_local=ssl.crops.num_local,
    )


def finish(
    config: Pretrain,
    folder: RunFolder,
    tracker: Tracker,
    run_id: str,
    plan: ReadPlan,
    seconds: float,
) -> dict[str, Any]:
    """Export the encoder of the last checkpoint, and write summary and report.

    Raises:
        InputError: there is no checkpoint.
    """
    found = latest_checkpoint(folder.path / "checkpoints")
    if found.checkpoint is None:
        raise InputError(f"training ended without a checkpoint in {folder.path / 'checkpoints'}")
    encoder = folder.path / "encoder"
    draft = folder.path / ".encoder.part"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(found.checkpoint.encoder, draft)
    replace_folder(draft, encoder)
    with keep_going("upload the encoder"):
        tracker.log_artifacts(run_id, encoder, "encoder")
    events = list(folder.read_events())
    last = next((e for e in reversed(events) if e.get("event") == "step"), {})
    probe = next((e for e in reversed(events) if e.get("event") == "probe"), {})
    summary = {
        "steps": found.checkpoint.step,
        "loss": last.get("loss"),
        "tiles_per_s": last.get("tiles_per_s"),
        "wait_share": last.get("wait_share"),
        **({"mfu": last["mfu"]} if "mfu" in last else {}),
        **({"cache_hit_share": _mean(events, "cache_hit_share")} if config.cache_tiles else {}),
        **{name: value for name, value in probe.items() if name.startswith("probe_")},
        "num_slides": plan.slides.num_rows,
        **quarantine_facts(config.index, folder.path, plan),
        "encoder": str(encoder),
        "mlflow_run_id": run_id,
        "report": str(folder.report_path),
        "seconds": round(seconds, 1),
        "next": f"cytoray embed --index {config.index} --encoder {encoder} --out BAGS",
    }
    folder.write_summary(summary)
    shown = pictures(config, plan, encoder)
    if config.share_pictures or tracker.is_local:
        with keep_going("send the pictures"):
            for name, image in shown.items():
                tracker.log_picture(run_id, image, f"pictures/{name}.png")
    section = pretrain_section(events, summary, shown)
    write_report(folder.report_path, [section], "Pretraining", str(folder.path))
    summary_table("pretrain", summary)
    return summary


def probe_log(
    folder: RunFolder, tracker: Tracker, run_id: str
) -> Callable[[int, dict[str, float], str], None]:
    """Where the probes of a run go: its events, and MLflow."""

    def log(step: int, metrics: dict[str, float], error: str) -> None:
        if error:
            folder.append_event({"event": "probe_failed", "step": step, "error": error})
            return
        folder.append_event({"event": "probe", "step": step, **metrics})
        with keep_going("log a probe"):
            tracker.log_metrics(run_id, metrics, step)

    return log


def end_tracking(folder: RunFolder, tracker: Tracker, run_id: str, *, failed: bool) -> None:
    """Send the metrics that MLflow has not taken yet, and close the run.

    With the server away both are left for the next `--resume`; the run's own files have it all.
    """
    with keep_going("send the last metrics"):
        send_pending(tracker.uri, pending_metrics(folder))
    with keep_going("close the run"):
        tracker.end_run(run_id, "FAILED" if failed else "FINISHED")


def send_what_is_left(config: Pretrain, folder: RunFolder, run_id: str) -> None:
    """Of a complete run: what MLflow did not take because it was away."""
    pending = pending_metrics(folder)
    if not pending.exists() or not pending.stat().st_size:
        return
    try:
        tracker = Tracker(config.tracking_uri or None, config.experiment)
    except InputError:  # still away
        return
    end_tracking(folder, tracker, run_id, failed=False)


def _mean(events: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [event[name] for event in events if event.get("event") == "step" and name in event]
    return round(sum(values) / len(values), 4) if values else None
