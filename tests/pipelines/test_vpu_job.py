"""`cytoray vpu` for real, on the shared slides."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from mlflow import MlflowClient

from cytoray.errors import InputError
from cytoray.mil.train_vpu import VPUConfig
from cytoray.models.encoder import load_encoder
from cytoray.tracking import Tracker
from pipelines import vpu

from ..tracking.test_child_runs import Server

SHORT = VPUConfig(epochs=1, steps_per_epoch=2, batch_tiles=4, val_tiles=8, lr=1e-3)


@pytest.mark.ray
def test_an_encoder_is_trained_tracked_and_resumed(indexed, tiny_encoder, tmp_path):
    config = vpu.Config(
        index=indexed.out, encoder=str(tiny_encoder), out=tmp_path / "vpu", vpu=SHORT,
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", resume=True,
    )  # fmt: skip
    summary = vpu.run(config)
    assert summary["exit_code"] == 0
    assert summary["num_quarantined"] == 0
    before, after = load_encoder(tiny_encoder), load_encoder(config.out)
    assert after.spec.architecture == before.spec.architecture
    changed = after.encoder_id != before.encoder_id
    assert changed == (summary["best_epoch"] == 1)
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    state = torch.load(config.out / "state.pt", weights_only=True)
    moved = [
        not torch.equal(state["model"][name], value)
        for name, value in before.model.state_dict().items()
    ]
    assert all(moved)
    assert Tracker(config.tracking_uri).get_run(summary["mlflow_run_id"]).status == "FINISHED"
    stamp = (config.out / "state.pt").stat().st_mtime_ns
    assert vpu.run(config)["best_epoch"] == summary["best_epoch"]
    assert (config.out / "state.pt").stat().st_mtime_ns == stamp


@pytest.mark.ray
def test_a_class_that_is_not_there_is_answered_with_those_that_are(indexed, tiny_encoder, tmp_path):
    with pytest.raises(InputError, match=r"class of label .*benign.*valid: 0, 1"):
        vpu.run(
            vpu.Config(index=indexed.out, encoder=str(tiny_encoder), out=tmp_path / "vpu",
                       positive="benign")
        )  # fmt: skip
    assert not (tmp_path / "vpu").exists()


@pytest.mark.ray
def test_a_server_that_does_not_answer_is_said_before_anything_is_written(
    ray_cluster, indexed, tiny_encoder, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = vpu.Config(
        index=indexed.out, encoder=str(tiny_encoder), out=tmp_path / "vpu", vpu=SHORT,
        tracking_uri="http://127.0.0.1:9",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"cannot use the MLflow store http://127.0.0.1:9"):
        vpu.run(config)
    assert not config.out.exists()


@pytest.mark.ray
@pytest.mark.drill
def test_a_server_that_goes_away_gets_the_metrics_later(
    indexed, tiny_encoder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server, train = Server(tmp_path), vpu.run_extractor

    def train_while_the_server_dies(*args, **options):
        server.stop()
        return train(*args, **options)

    server.start()
    try:
        monkeypatch.setattr(vpu, "run_extractor", train_while_the_server_dies)
        config = vpu.Config(
            index=indexed.out, encoder=str(tiny_encoder), out=tmp_path / "vpu", vpu=SHORT,
            tracking_uri=server.uri, tracking_wait_s=0.0,
        )  # fmt: skip
        summary = vpu.run(config)
        assert "nothing is lost: run the same command with --resume" in capsys.readouterr().out
        server.start()
        monkeypatch.setattr(vpu, "run_extractor", train)
        again = vpu.run(replace(config, resume=True))
        assert again["mlflow_run_id"] == summary["mlflow_run_id"]
        assert Tracker(server.uri).get_run(summary["mlflow_run_id"]).status == "FINISHED"
        history = MlflowClient(server.uri).get_metric_history(summary["mlflow_run_id"], "val_loss")
        assert [value.step for value in history] == [0, 1]
    finally:
        server.stop()
