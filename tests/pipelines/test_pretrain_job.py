from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from cytoray.config import from_plain, to_plain
from cytoray.errors import InputError
from cytoray.models.encoder import load_encoder
from cytoray.runs import read_events
from cytoray.streaming.ledger import used_tiles
from cytoray.tracking import Tracker
from cytoray.training import PretrainEngine, load_checkpoint
from cytoray.training.checkpoint import list_checkpoints
from cytoray.training.costs import step_costs
from pipelines import pretrain
from pipelines.pretrain_report import _gpu_peak

from ..conftest import MPP, TILE_PX, tiny_ssl

pytestmark = pytest.mark.ray


def events_of(out: Path, kind: str) -> list[dict]:
    return [e for e in read_events(out / "events.jsonl") if e["event"] == kind]


def losses(out: Path) -> dict[int, list[float]]:
    """Losses logged at each step, more than one where steps were done again."""
    found: dict[int, list[float]] = {}
    for event in events_of(out, "step"):
        found.setdefault(event["step"], []).append(event["loss"])
    return found


@pytest.fixture
def config(indexed, tracking_uri, tmp_path) -> pretrain.Config:
    """The run of the fixture `pretrained`, in a folder of its own."""
    return pretrain.Config(
        index=indexed.out,
        out=tmp_path / "run",
        ssl=tiny_ssl(),
        shuffle_chunks=4,
        checkpoint_every=5,
        log_every=1,
        tracking_uri=tracking_uri,
    )


def test_every_step_is_logged_and_finite(pretrained) -> None:
    steps = losses(pretrained.out)
    assert list(steps) == list(range(1, 13))
    assert all(len(values) == 1 and math.isfinite(values[0]) for values in steps.values())
    assert len({values[0] for values in steps.values()}) == 12
    [start] = events_of(pretrained.out, "start")
    [end] = events_of(pretrained.out, "end")
    assert (start["step"], start["world"], end["step"], end["tiles"]) == (0, 1, 12, 96)
    last = events_of(pretrained.out, "step")[-1]
    assert last["nuclei_per_tile"] > 0
    assert 0 <= last["wait_share"] <= 1
    assert pretrained.summary["steps"] == 12
    assert pretrained.summary["loss"] == last["loss"]
    assert pretrained.summary["num_quarantined_slides"] == 0
    assert pretrained.summary["num_quarantined_tiles"] == 0
    assert pretrained.summary["quarantine"] == str(pretrained.out / "quarantine.parquet")


def test_plain_timm_loads_the_encoder(pretrained) -> None:
    folder = Path(pretrained.summary["encoder"])
    spec = json.loads((folder / "encoder.json").read_text())
    model = timm.create_model(spec["architecture"], num_classes=0, **spec["kwargs"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    ours = load_encoder(folder)
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    )
    mean, std = torch.tensor(spec["mean"]), torch.tensor(spec["std"])
    images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        assert torch.allclose(model.eval()(images), ours(pixels), atol=1e-5)
    assert (spec["mpp"], spec["source"]["tile_px"], spec["embed_dim"]) == (MPP, TILE_PX, 64)


def test_the_teacher_moved_away_from_its_start(pretrained, config) -> None:
    """What is exported is what was trained."""
    start = PretrainEngine(config.ssl, torch.device("cpu")).encoder_state_dict()
    trained = load_file(Path(pretrained.summary["encoder"]) / "model.safetensors")
    assert set(start) == set(trained)
    moved = [name for name in start if not torch.equal(start[name].cpu(), trained[name])]
    assert len(moved) > len(start) / 2


def test_the_run_folder_runs_again(pretrained) -> None:
    stored = yaml.safe_load((pretrained.out / "config.yaml").read_text())
    again = from_plain(pretrain.Config, stored)
    assert again.ssl == tiny_ssl()
    assert again.out == pretrained.out
    checkpoints = [path.name for path in list_checkpoints(pretrained.out / "checkpoints")]
    assert checkpoints == ["step_00000012", "step_00000010", "step_00000005"]
    assert json.loads((pretrained.out / "summary.json").read_text())["steps"] == 12


def test_mlflow_has_the_run_its_metrics_and_the_encoder(pretrained, tracking_uri) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(tracking_uri)
    run = tracker.get_run(pretrained.summary["mlflow_run_id"])
    assert run.status == "FINISHED"
    assert run.params["ssl.batch_size"] == "8"
    assert run.metrics["loss"] == pytest.approx(pretrained.summary["loss"])
    client = MlflowClient(tracking_uri)
    history = client.get_metric_history(run.run_id, "loss")
    assert [(m.step, [m.value]) for m in sorted(history, key=lambda m: m.step)] == [
        (step, values) for step, values in losses(pretrained.out).items()
    ]
    assert {f.path for f in client.list_artifacts(run.run_id, "encoder")} == {
        "encoder/encoder.json", "encoder/model.safetensors"
    }  # fmt: skip
    assert {f.path for f in client.list_artifacts(run.run_id, "pictures")} == {
        "pictures/attention.png", "pictures/views.png"
    }  # fmt: skip
    watched = "lr weight_decay ema grad_norm_backbone teacher_entropy effective_rank wait_share"
    for name in f"{watched} tiles_per_s tflops loss_koleo".split():
        assert math.isfinite(run.metrics[name]), name


def test_the_encoder_is_probed_on_the_way_and_at_the_end(pretrained, tracking_uri) -> None:
    """Of the checkpoints of steps 5, 10 and 12 at least the last one is."""
    probes = events_of(pretrained.out, "probe")
    assert events_of(pretrained.out, "probe_failed") == []
    assert {event["step"] for event in probes} <= {5, 10, 12}
    last = probes[-1]
    assert last["step"] == 12
    assert 0 <= last["probe_knn_accuracy"] <= 1
    assert last["probe_linear_accuracy"] > 0.5  # three classes that differ in colour
    assert pretrained.summary["probe_linear_accuracy"] == last["probe_linear_accuracy"]
    run = Tracker(tracking_uri).get_run(pretrained.summary["mlflow_run_id"])
    assert run.metrics["probe_knn_auc"] == pytest.approx(last["probe_knn_auc"])
    assert not (pretrained.out / ".probe").exists()


def test_the_ledger_names_the_tiles_of_every_step(pretrained) -> None:
    steps = used_tiles(pretrained.out)
    assert [len(set(names)) for names in steps] == [8] * 12
    assert len({name for names in steps for name in names}) == 96


def test_a_dry_run_starts_nothing(config, cytoray, tmp_path) -> None:
    summary = pretrain.run(replace(config, dry_run=True))
    assert summary["steps"] == 12
    assert summary["workers"] == "1 x 1 CPU"
    assert not config.out.exists()
    assert "GFLOP/s of a product here (threads: 1)" in summary["hours"]


def test_a_dry_run_tells_costs_also_where_the_cluster_is_too_small(config, capsys) -> None:
    with pytest.raises(InputError, match="the cluster is too small for this job"):
        pretrain.run(replace(config, dry_run=True, workers=8, use_gpu=True))
    said = capsys.readouterr().out
    assert "8 x GPU" in said
    assert "GFLOP a tile" in said


def test_hours_are_the_work_at_the_speed_that_is_named(config) -> None:
    summary = pretrain.run(replace(config, dry_run=True, epochs=1e6))
    found = re.search(r"at least ([\d.]+) .* the ([\d,]+) GFLOP/s", summary["hours"])
    assert found is not None
    work = step_costs(config.ssl).flops_per_tile * config.ssl.batch_size * summary["steps"]
    hours = work / float(found[2].replace(",", "")) / 3.6e12
    assert float(found[1]) == pytest.approx(hours, rel=0.1)


def test_hours_of_gpus_are_by_the_fastest_kind_that_is_known() -> None:
    found = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:T4": 1.0, "accelerator_type:H100": 1.0}
    assert _gpu_peak(found) == (989e12, "the 989 TFLOP/s of H100")
    assert _gpu_peak({"CPU": 8.0, "accelerator_type:XPU-9": 1.0})[0] == 1e15


def test_a_diverged_run_stops_with_step_tiles_and_state(config, cytoray, tmp_path) -> None:
    optim = replace(tiny_ssl().optim, lr=1e30, warmup_steps=0, freeze_last_layer_steps=0)
    config = replace(config, ssl=tiny_ssl(optim=optim), log_every=5, log_tiles=True)
    flags = tmp_path / "config.yaml"
    flags.write_text(yaml.safe_dump(to_plain(config)))
    ended = cytoray("pretrain", "--config", flags)
    assert ended.code == 2
    assert "training diverged at step" in ended.err
    assert "Traceback" not in ended.err
    [stopped] = events_of(config.out, "stopped")
    assert 1 < stopped["step"] <= 5
    assert stopped["tile_ids"] == used_tiles(config.out)[stopped["step"] - 1]
    [kept] = list_checkpoints(config.out / "diverged")
    assert load_checkpoint(kept)["tile_ids"] == stopped["tile_ids"]
    assert list_checkpoints(config.out / "checkpoints") == []


@pytest.mark.slow
def test_two_workers_have_the_losses_of_one(config, pretrained) -> None:
    """The same global batches, halved: equal to 1e-4 in fp32 for the first five steps."""
    pretrain.run(replace(config, workers=2))
    assert [event["world"] for event in events_of(config.out, "start")] == [2]
    one, two = losses(pretrained.out), losses(config.out)
    assert list(two) == list(one)
    for step in range(1, 6):
        assert two[step][0] == pytest.approx(one[step][0], abs=1e-4)


@pytest.mark.drill
def test_a_killed_worker_is_replaced_and_the_run_goes_on_by_itself(config) -> None:
    """SIGKILL in mid-run: it ends with the very bits of a run that was left alone."""
    config = replace(config, ssl=tiny_ssl(total_steps=120), checkpoint_every=10, deterministic=True)
    killed_at = []

    def kill_when_under_way() -> None:
        while not killed_at and time.monotonic() < end:
            time.sleep(0.02)
            step = max(losses(config.out), default=0)
            if step >= 15 and list_checkpoints(config.out / "checkpoints"):
                os.kill(events_of(config.out, "start")[0]["pid"], signal.SIGKILL)
                killed_at.append(step)

    whole = replace(config, out=config.out.with_name("unbroken"))
    end = time.monotonic() + 120
    killer = threading.Thread(target=kill_when_under_way, daemon=True)
    killer.start()
    summary = pretrain.run(config)
    killer.join()
    starts = events_of(config.out, "start")
    assert len(starts) == 2
    assert 0 < starts[1]["step"] <= max(killed_at)
    assert starts[1]["step"] % 10 == 0
    assert starts[1]["tiles"] == 8 * starts[1]["step"]
    assert_resumed_exactly(config.out, 120)
    assert summary["steps"] == 120
    pretrain.run(whole)
    states = [
        load_checkpoint(list_checkpoints(run.out / "checkpoints")[0]) for run in (config, whole)
    ]
    assert states[0]["place"] == states[1]["place"]
    for part in ("model", "optimizer", "rng"):
        left, right = (state["engine"][part] for state in states)
        assert_same(left, right, part)


def assert_same(left, right, where: str) -> None:
    """Equal to the last bit."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert left == right, where


def assert_resumed_exactly(out: Path, total_steps: int) -> None:
    """Every step is there, and a step that was done twice gave the same loss twice."""
    found = losses(out)
    assert list(range(1, total_steps + 1)) == sorted(found)
    again = {step: values for step, values in found.items() if len(values) > 1}
    assert again
    for values in again.values():
        assert values == pytest.approx([values[0]] * len(values), abs=1e-4)
    [end] = events_of(out, "end")
    assert (end["step"], end["tiles"]) == (total_steps, 8 * total_steps)


@pytest.mark.drill
def test_a_killed_driver_and_resume_with_two_workers(
    config, cytoray, start_cytoray, tracking_uri, tmp_path
) -> None:
    """The same command with --resume goes on from the last checkpoint, here with more workers."""
    flags = tmp_path / "config.yaml"
    config = replace(config, ssl=tiny_ssl(total_steps=120), checkpoint_every=10)
    flags.write_text(yaml.safe_dump(to_plain(config)))
    driver = start_cytoray("pretrain", "--config", flags)

    def under_way() -> bool:
        saved = list_checkpoints(config.out / "checkpoints")
        return bool(saved) and max(losses(config.out), default=0) > int(saved[0].name[5:]) + 5

    driver.wait_for(under_way)
    driver.kill()
    stopped_at = max(losses(config.out))
    assert stopped_at < 120
    refused = cytoray("pretrain", "--config", flags)
    assert refused.code == 2
    assert "pass --resume to go on" in refused.err
    refused = cytoray("pretrain", "--config", flags, "--resume", "--ssl.optim.lr", 0.1)
    assert refused.code == 2
    assert "ssl.optim.lr: 0.004 -> 0.1" in refused.err
    assert cytoray("pretrain", "--config", flags, "--resume", "--workers", 2).code == 0
    starts = events_of(config.out, "start")
    assert [event["world"] for event in starts] == [1, 2]
    assert 0 < starts[1]["step"] <= stopped_at
    assert_resumed_exactly(config.out, 120)
    summary = json.loads((config.out / "summary.json").read_text())
    tracker = Tracker(tracking_uri)
    assert tracker.get_run(summary["mlflow_run_id"]).status == "FINISHED"
