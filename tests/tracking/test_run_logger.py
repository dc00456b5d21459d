import json
import logging
import socket
import time

import pytest
from mlflow import MlflowClient

from cytoray.tracking import RunLogger, send_pending


@pytest.fixture
def dead_uri(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def history(tracker, run_id, name):
    return [(m.step, m.value) for m in MlflowClient(tracker.uri).get_metric_history(run_id, name)]


def test_metrics_arrive_in_the_background(tracker, tmp_path):
    run_id = tracker.start_run("train")
    with RunLogger(tracker.uri, run_id, tmp_path / "pending.jsonl", flush_every_s=0.05) as log:
        for step in range(5):
            log.log({"loss": 1.0 / (step + 1), "loss/koleo (x)": step}, step)
        deadline = time.time() + 20
        while len(history(tracker, run_id, "loss")) < 5 and time.time() < deadline:
            time.sleep(0.05)
        assert history(tracker, run_id, "loss") == [(s, 1.0 / (s + 1)) for s in range(5)]
    assert history(tracker, run_id, "loss/koleo _x_")[-1] == (4, 4.0)
    assert (tmp_path / "pending.jsonl").read_bytes() == b""
    assert tracker.get_run(run_id).status == "RUNNING"


def test_dead_server_keeps_metrics_for_later(tracker, dead_uri, tmp_path, caplog):
    run_id = tracker.start_run("train")
    pending = tmp_path / "pending.jsonl"
    with caplog.at_level(logging.WARNING):
        log = RunLogger(dead_uri, run_id, pending, flush_every_s=0.05)
        started = time.time()
        for step in range(200):
            log.log({"loss": float(step)}, step)
        assert time.time() - started < 5, "logging must not wait for the server"
        assert log.flush() is False
        assert log.flush() is False
        assert log.close() is False
    assert caplog.text.count("does not answer") == 1
    assert len(pending.read_bytes().splitlines()) == 200

    with RunLogger(tracker.uri, run_id, pending) as log:
        log.log({"loss": 200.0}, 200)
    assert history(tracker, run_id, "loss") == [(s, float(s)) for s in range(201)]
    assert pending.read_bytes() == b""


def test_send_pending_after_a_torn_line_and_twice(tracker, tmp_path):
    run_id = tracker.start_run("train")
    pending = tmp_path / "pending.jsonl"
    record = {"run_id": run_id, "step": 3, "time_ms": 1000, "metrics": {"loss": 0.25}}
    data = json.dumps(record).encode() + b"\n" + b'{"run_id": "'
    pending.write_bytes(data)
    assert send_pending(tracker.uri, pending) == 1
    assert pending.read_bytes() == b""
    pending.write_bytes(data)
    assert send_pending(tracker.uri, pending) == 1
    assert history(tracker, run_id, "loss") == [(3, 0.25)]
    assert send_pending(tracker.uri, tmp_path / "absent") == 0


def test_a_line_after_a_torn_one_is_not_lost(tracker, tmp_path):
    run_id = tracker.start_run("train")
    pending = tmp_path / "pending.jsonl"
    pending.write_bytes(b'{"run_id": "torn')
    with RunLogger(tracker.uri, run_id, pending) as log:
        log.log({"loss": 2.0}, 1)
    assert history(tracker, run_id, "loss") == [(1, 2.0)]


def test_missing_database_is_not_created_by_a_worker(tmp_path):
    uri = f"sqlite:///{tmp_path}/elsewhere.db"
    with RunLogger(uri, "0" * 32, tmp_path / "pending.jsonl") as log:
        log.log({"loss": 1.0}, 1)
        assert log.flush() is False
    assert not (tmp_path / "elsewhere.db").exists()
    assert len((tmp_path / "pending.jsonl").read_bytes().splitlines()) == 1


def test_a_deleted_run_does_not_stop_training(tracker, tmp_path):
    with RunLogger(tracker.uri, "0" * 32, tmp_path / "pending.jsonl") as log:
        log.log({"loss": float("nan")}, 1)
        assert log.flush() is False


def test_nan_is_logged_as_nan(tracker, tmp_path):
    run_id = tracker.start_run("train")
    with RunLogger(tracker.uri, run_id, tmp_path / "pending.jsonl") as log:
        log.log({"loss": float("nan")}, 1)
    values = history(tracker, run_id, "loss")
    assert len(values) == 1
    assert values[0][1] != values[0][1]


def test_unwritable_file_warns_once(tracker, tmp_path, caplog):
    run_id = tracker.start_run("train")
    log = RunLogger(tracker.uri, run_id, tmp_path / "pending.jsonl", flush_every_s=60)
    (tmp_path / "pending.jsonl").mkdir()
    log.log({"loss": 1.0}, 1)
    log.log({"loss": 1.0}, 2)
    log.close()
    assert caplog.text.count("does not answer") == 1
