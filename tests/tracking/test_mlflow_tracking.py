import socket
import subprocess
import sys

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cytoray.errors import InputError
from cytoray.mil import LabelledBag, MILConfig, predict, save_head, train_frozen
from cytoray.tracking import Tracker, keep_going, open_tracker
from cytoray.tracking.head_model import head_facts


def closed_port_uri():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_same_key_is_the_same_run(tracker):
    params = {"lr": 0.1, "train": {"workers": 1}}
    first = tracker.start_run("pretrain", {"job": "pretrain"}, params, key="run o'one")
    tracker.end_run(first, "FAILED")
    assert tracker.get_run(first).status == "FAILED"

    params["train"]["workers"] = 2
    again = Tracker(tracker.uri, "tests").start_run("pretrain", {}, params, key="run o'one")
    assert again == first
    run = tracker.get_run(first)
    assert run.status == "RUNNING"
    assert run.params == {"lr": "0.1", "train.workers": "1"}
    assert run.tags["cytoray.changed.train.workers"] == "2"
    assert run.tags["job"] == "pretrain"

    other = tracker.start_run("pretrain", key="another")
    assert other != first
    assert tracker.start_run("pretrain") != tracker.start_run("pretrain")
    assert tracker.find_run("unknown") is None


def test_a_store_opens_in_the_background(tracker, monkeypatch):
    opened = open_tracker(tracker.uri, "tests")
    assert opened().experiment_id == tracker.experiment_id
    assert opened() is opened()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    waiting = open_tracker(closed_port_uri(), "tests")
    for _ in range(2):
        with pytest.raises(InputError, match="cannot use the MLflow store"):
            waiting()


def test_children_of_a_parent(tracker):
    parent = tracker.start_run("tune", key="tune")
    keys = [f"tune/trial_{index}" for index in range(3)]
    for _ in range(2):
        for index, key in enumerate(keys):
            run_id = tracker.start_run(
                f"trial_{index}", params={"rank": index}, parent_run_id=parent, key=key
            )
            tracker.log_metrics(run_id, {"auc": 0.5 + index / 10}, step=1)
            tracker.end_run(run_id)
    children = tracker.child_runs(parent)
    assert [child.key for child in children] == keys
    assert [child.metrics["auc"] for child in children] == pytest.approx([0.5, 0.6, 0.7])
    assert {child.status for child in children} == {"FINISHED"}
    assert tracker.child_runs(children[0].run_id) == []


def test_many_params_and_metrics_go_in_batches(tracker):
    run_id = tracker.start_run("wide", params={f"p{i}": i for i in range(250)})
    tracker.log_metrics(run_id, {f"m{i}": i for i in range(250)}, step=7)
    run = tracker.get_run(run_id)
    assert len(run.params) == 250
    assert run.metrics["m249"] == 249
    history = MlflowClient(tracker.uri).get_metric_history(run_id, "m3")
    assert [(metric.step, metric.value) for metric in history] == [(7, 3.0)]


def test_registered_model_comes_back_and_is_not_doubled(tracker, tmp_path):
    folder = tmp_path / "head"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights 1")
    (folder / "model.json").write_text("{}")
    run_id = tracker.start_run("tune")
    assert tracker.register_model(run_id, "head", folder, {"auc": 0.9}) == "1"
    assert tracker.register_model(run_id, "head", folder) == "1"
    (folder / "model.safetensors").write_bytes(b"weights 2")
    assert tracker.register_model(run_id, "head", folder, description="better") == "2"

    for version, weights in (("1", b"weights 1"), ("2", b"weights 2")):
        copy = tracker.download_model("head", version, tmp_path / f"copy{version}")
        assert (copy / "model.safetensors").read_bytes() == weights
        assert not list(copy.rglob("*.pkl"))
    version = MlflowClient(tracker.uri).get_model_version("head", "1")
    assert version.tags["auc"] == "0.9"
    # What a tracking server demands of a local source: below the artifacts of the run.
    run = MlflowClient(tracker.uri).get_run(run_id)
    assert version.source.startswith(f"{run.info.artifact_uri}/model/")


def test_a_registered_head_has_a_signature_and_mlflow_can_ask_it(tracker, tmp_path, monkeypatch):
    bags = [LabelledBag(f"s{i}", np.random.default_rng(i).normal(size=(5, 4)), i % 2)
            for i in range(6)]  # fmt: skip
    result = train_frozen(MILConfig(aggregator="mean", epochs=1), bags[:4], bags[4:], 2)
    tasks = {"cancer": ("no", "yes")}
    save_head(tmp_path / "head", result, classes=tasks, encoder_id="e")
    run_id = tracker.start_run("tune")
    tracker.register_model(run_id, "head", tmp_path / "head", facts=head_facts(4, tasks))
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    mlflow.set_tracking_uri(tracker.uri)
    signature = mlflow.models.get_model_info("models:/head/1").signature
    assert signature.inputs.input_dict()["features"].shape == (-1, 4)
    assert signature.outputs.input_dict()["cancer"].shape == (-1, 2)
    features = bags[0].features.astype(np.float32)
    answer = mlflow.pyfunc.load_model("models:/head/1").predict({"features": features})
    expected = predict(result.build(), [features]).probabilities
    np.testing.assert_allclose(answer["cancer"], expected, atol=1e-6)


def test_artifacts_lie_next_to_the_database(tracker, tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1\n")
    run_id = tracker.start_run("any")
    tracker.log_artifact(run_id, tmp_path / "config.yaml")
    assert len(list((tmp_path / "mlartifacts").rglob("config.yaml"))) == 1
    (tmp_path / "report.html").write_text("<img>")
    with pytest.raises(ValueError, match="patient data"):
        tracker.log_artifact(run_id, tmp_path / "report.html")


def test_bad_stores_and_statuses_are_explained(tracker, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match="cannot use the MLflow store http"):
        Tracker(closed_port_uri())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another tracking URI"):
        Tracker(f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(InputError, match="FINISHED"):
        tracker.end_run(tracker.start_run("x"), "DONE")
    MlflowClient(tracker.uri).delete_experiment(tracker.experiment_id)
    with pytest.raises(InputError, match="was deleted"):
        Tracker(tracker.uri, "tests")


def test_keep_going_swallows_only_store_failures(tracker, caplog):
    with keep_going("end the run"):
        tracker.end_run("0" * 32)
    assert "could not end the run" in caplog.text
    with pytest.raises(MlflowException):
        tracker.end_run("0" * 32)
    with pytest.raises(KeyError), keep_going("x"):
        raise KeyError


def test_ui_command_listens_on_this_machine_alone(tracker):
    assert tracker.ui_command() == f"mlflow ui --backend-store-uri {tracker.uri} --host 127.0.0.1"


def test_two_drivers_may_create_the_database_at_once(tmp_path):
    code = (
        "import sys; from cytoray.tracking import Tracker;"
        "print(Tracker(sys.argv[1], 'e').start_run('r', key='k' + sys.argv[2]))"
    )
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    drivers = [
        subprocess.Popen([sys.executable, "-c", code, uri, str(i)], stdout=subprocess.PIPE)
        for i in range(2)
    ]
    outputs = [driver.communicate(timeout=100)[0].decode().strip() for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0]
    assert len(set(outputs)) == 2
    assert Tracker(uri, "e").get_run(outputs[0]).key == "k0"
