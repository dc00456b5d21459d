from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cytoray.tracking import ChildRun, ChildRuns, Tracker, patiently


def line(step: int, value: float) -> str:
    return json.dumps({"step": step, "time_ms": 1000 + step, "metrics": {"loss": value}}) + "\n"


def children_in(folder: Path, count: int = 2) -> list[ChildRun]:
    made = []
    for i in range(count):
        (folder / f"t{i}").mkdir(parents=True, exist_ok=True)
        made.append(
            ChildRun(key=f"run:t{i}", name=f"t{i}", folder=folder / f"t{i}", params={"lr": i})
        )
    return made


def write(child: ChildRun, *steps: int) -> None:
    with (child.folder / "metrics.jsonl").open("a") as stream:
        stream.writelines(line(step, step / 10) for step in steps)


def history(tracker: Tracker, run_id: str) -> list[tuple[int, float]]:
    entries = MlflowClient(tracker.uri).get_metric_history(run_id, "loss")
    return sorted((entry.step, entry.value) for entry in entries)


def test_a_run_begins_grows_and_ends_with_its_trial(tracker, tmp_path) -> None:
    parent = tracker.start_run("tune")
    one, two = children_in(tmp_path)
    with ChildRuns(tracker, parent, [one, two], every_s=0.05) as children:
        write(one, 1, 2)
        (one.folder / "metrics.jsonl").open("a").write('{"step": 3, "torn')
        end = time.monotonic() + 20
        while not tracker.child_runs(parent) and time.monotonic() < end:
            time.sleep(0.05)
        [run] = tracker.child_runs(parent)
        assert (run.name, run.status, run.params) == ("t0", "RUNNING", {"lr": "0"})
        (one.folder / "metrics.jsonl").open("a").write("\n")
        write(one, 3)
        children.finish("t0", "FINISHED", {"best_auc": 0.5, "nothing": float("nan")})
        children.finish("t1", "FAILED", tags={"cytoray.error": "no slide"})
    assert children.settle(20) == []
    runs = {run.name: run for run in tracker.child_runs(parent)}
    assert {name: run.status for name, run in runs.items()} == {"t0": "FINISHED", "t1": "FAILED"}
    assert history(tracker, runs["t0"].run_id) == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert runs["t0"].metrics["best_auc"] == 0.5
    assert "nothing" not in runs["t0"].metrics
    assert runs["t1"].tags["cytoray.error"] == "no slide"

    again = ChildRuns(tracker, parent, [one, two])
    again.finish("t0", "FINISHED")
    again.finish("t1", "FINISHED")
    assert again.settle(20) == []
    after = {run.name: run for run in tracker.child_runs(parent)}
    assert {name: run.run_id for name, run in after.items()} == {
        name: run.run_id for name, run in runs.items()
    }
    assert after["t1"].status == "FINISHED", "a failed trial that was run again"


def test_what_is_written_while_a_pass_runs_is_sent_before_the_end(tracker, tmp_path, monkeypatch):
    parent = tracker.start_run("tune")
    [one] = children_in(tmp_path, 1)
    children = ChildRuns(tracker, parent, [one])
    send = tracker.log_lines

    def send_while_the_trial_ends(run_id: str, data: bytes) -> None:
        send(run_id, data)
        monkeypatch.setattr(tracker, "log_lines", send)
        write(one, 2)
        children.finish("t0", "FINISHED")

    monkeypatch.setattr(tracker, "log_lines", send_while_the_trial_ends)
    write(one, 1)
    assert children.settle(20) == []
    [run] = tracker.child_runs(parent)
    assert history(tracker, run.run_id) == [(1, 0.1), (2, 0.2)]


class Server:
    """A real `mlflow server` on this machine alone, that can go away and come back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1",
                 "--port", str(self.port), "--backend-store-uri",
                 f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination",
                 str(self.folder / "artifacts")],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 90
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)
        raise TimeoutError((self.folder / "server.log").read_text())

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.mark.drill
def test_a_server_that_goes_away_loses_nothing(empty_database, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    server = Server(tmp_path)
    server.start()
    try:
        tracker = Tracker(server.uri, "tests")
        parent = tracker.start_run("tune", key="tune")
        one, two = children_in(tmp_path)
        with ChildRuns(tracker, parent, [one, two], every_s=0.05) as children:
            write(one, 1, 2)
            end = time.monotonic() + 30
            while not tracker.child_runs(parent) and time.monotonic() < end:
                time.sleep(0.05)
            server.stop()
            write(one, 3)
            write(two, 1)
            children.finish("t0", "FINISHED", {"best_auc": 1.0})
            children.finish("t1", "FINISHED")
            assert children.settle(0.5) == ["t0", "t1"]
        assert patiently(lambda: tracker.end_run(parent), 0.2, 0.1) is None
        server.start()
        assert children.settle(30) == []
        runs = {run.name: run for run in tracker.child_runs(parent)}
        assert {run.status for run in runs.values()} == {"FINISHED"}
        assert sorted(runs) == ["t0", "t1"]
        assert history(tracker, runs["t0"].run_id) == [(1, 0.1), (2, 0.2), (3, 0.3)]
        assert history(tracker, runs["t1"].run_id) == [(1, 0.1)]
        (tmp_path / "head").mkdir()
        (tmp_path / "head" / "head.json").write_text("{}")
        assert tracker.register_model(parent, "head", tmp_path / "head") == "1"
        copy = tracker.download_model("head", "1", tmp_path / "copy")
        assert (copy / "head.json").read_text() == "{}"
    finally:
        server.stop()


def test_patience_ends() -> None:
    calls = []

    def away() -> None:
        calls.append(1)
        raise OSError("gone")

    assert patiently(away, 0.05, 0.01) is None
    assert len(calls) >= 2
    assert patiently(lambda: 3, 1.0) == 3
