from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cytoray.distributed.train_log import pending_metrics
from cytoray.runs import RunFolder
from cytoray.tracking import Tracker
from pipelines import pretrain
from pipelines.pretrain_report import end_tracking, send_what_is_left
from pipelines.runs import SMOKE

from ..tracking.test_child_runs import Server


@pytest.mark.drill
def test_a_server_that_is_away_at_the_end_gets_the_rest_later(tmp_path, monkeypatch) -> None:
    """The end of a run does not fail; started again with --resume, it sends what was kept."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = Server(tmp_path)
    server.start()
    try:
        tracker = Tracker(server.uri, "tests")
        folder = RunFolder.open(tmp_path / "run", "pretrain", {})
        run_id = tracker.start_run("pretrain", key=folder.run_id)
        server.stop()
        line = {"run_id": run_id, "step": 3, "time_ms": 1, "metrics": {"loss": 2.5}}
        pending_metrics(folder).write_text(json.dumps(line) + "\n")
        end_tracking(folder, tracker, run_id, failed=False)
        assert pending_metrics(folder).read_text()
        config = pretrain.Config(
            index=Path("index"), out=folder.path, ssl=SMOKE.ssl, tracking_uri=server.uri,
            experiment="tests",
        )  # fmt: skip
        send_what_is_left(config, folder, run_id)
        assert pending_metrics(folder).read_text()
        server.start()
        send_what_is_left(config, folder, run_id)
        assert not pending_metrics(folder).read_text()
        assert tracker.get_run(run_id).status == "FINISHED"
        [value] = MlflowClient(server.uri).get_metric_history(run_id, "loss")
        assert (value.step, value.value) == (3, 2.5)
    finally:
        server.stop()
