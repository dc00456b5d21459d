import json
import threading
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
import yaml

from cytoray.errors import InputError
from cytoray.plain import json_ready
from cytoray.runs import RunFolder, append_event, config_changes, read_config, read_events


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Crops:
    sizes: tuple[int, ...] = (224, 96)
    out: Path = Path("/data/x")


CONFIG = {"lr": 1e-5, "crops": Crops(), "workers": 1, "resources": {"cpus": 2}, "note": "1e-5"}


def test_new_run_writes_config_and_header(tmp_path):
    run = RunFolder.open(tmp_path / "a" / "run", "pretrain", CONFIG)
    assert not run.resumed
    assert read_config(run.config_path) == {
        "lr": 1e-5,
        "crops": {"sizes": [224, 96], "out": "/data/x"},
        "workers": 1,
        "resources": {"cpus": 2},
        "note": "1e-5",
    }
    assert [event["event"] for event in run.read_events()] == ["started"]
    assert run.read_summary() is None


def test_same_folder_needs_resume(tmp_path):
    first = RunFolder.open(tmp_path, "pretrain", CONFIG)
    with pytest.raises(InputError, match="pass --resume"):
        RunFolder.open(tmp_path, "pretrain", CONFIG)
    again = RunFolder.open(tmp_path, "pretrain", CONFIG, resume=True)
    assert again.resumed
    assert again.run_id == first.run_id
    assert [event["event"] for event in again.read_events()] == ["started", "resumed"]


def test_resume_of_nothing_starts(tmp_path):
    assert not RunFolder.open(tmp_path / "new", "embed", {}, resume=True).resumed


def test_folder_of_another_job_is_refused(tmp_path):
    RunFolder.open(tmp_path, "embed", {})
    for resume in (False, True):
        with pytest.raises(InputError, match="belongs to a run of `embed`, not `tune`"):
            RunFolder.open(tmp_path, "tune", {}, resume=resume)


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"not empty \(photo\.jpg\)"):
        RunFolder.open(tmp_path, "embed", {})
    with pytest.raises(InputError, match="is a file"):
        RunFolder.open(tmp_path / "photo.jpg", "embed", {})
    with pytest.raises(InputError, match="choose another --out"):
        RunFolder.open(tmp_path / "photo.jpg" / "sub", "embed", {})
    (tmp_path / "photo.jpg").unlink()
    (tmp_path / "mlflow.db").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"")
    assert not RunFolder.open(tmp_path, "embed", {}).resumed


def test_changed_config_names_each_field(tmp_path):
    RunFolder.open(tmp_path, "pretrain", CONFIG)
    changed = CONFIG | {"lr": 2e-5, "crops": Crops(sizes=(112, 96)), "added": True, "workers": 4}
    with pytest.raises(InputError) as error:
        RunFolder.open(tmp_path, "pretrain", changed, resume=True)
    assert error.value.problems == [
        "lr: 1e-05 -> 2e-05",
        "crops.sizes: [224, 96] -> [112, 96]",
        "added: (absent) -> true",
    ]
    assert read_config(tmp_path / "config.yaml")["workers"] == 1


def test_where_it_runs_may_change(tmp_path):
    RunFolder.open(tmp_path, "pretrain", CONFIG)
    elsewhere = CONFIG | {"workers": 8, "resources": {"cpus": 64, "gpus": 8}}
    run = RunFolder.open(tmp_path, "pretrain", elsewhere, resume=True)
    assert read_config(run.config_path)["resources"] == {"cpus": 64, "gpus": 8}
    resumed = list(run.read_events())[-1]
    assert resumed["changed"]["workers"] == "8"
    with pytest.raises(InputError, match="workers: 8 -> 1"):
        RunFolder.open(tmp_path, "pretrain", CONFIG, resume=True, may_change=())


def test_start_killed_before_the_config_was_written(tmp_path):
    run = RunFolder.open(tmp_path, "pretrain", CONFIG)
    run.config_path.unlink()
    assert RunFolder.open(tmp_path, "pretrain", CONFIG, resume=True).run_id == run.run_id
    assert read_config(run.config_path)["workers"] == 1


def test_damaged_files_are_explained(tmp_path):
    RunFolder.open(tmp_path, "pretrain", {})
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        RunFolder.open(tmp_path, "pretrain", {}, resume=True)
    (tmp_path / "config.yaml").write_text("- a\n")
    with pytest.raises(InputError, match="name: value"):
        read_config(tmp_path / "config.yaml")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        RunFolder.open(tmp_path, "pretrain", {}, resume=True)
    with pytest.raises(InputError, match="cannot read"):
        read_config(tmp_path / "absent.yaml")


def test_events_survive_torn_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, {"step": 1, "loss": float("nan"), "at": np.float32(0.5)})
    with path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert [event["step"] for event in read_events(path)] == [1]
    append_event(path, {"step": 3, "time": "fixed"})
    events = list(read_events(path))
    assert [event["step"] for event in events] == [1, 3]
    assert events[0]["loss"] is None
    assert events[0]["at"] == 0.5
    assert events[1]["time"] == "fixed"
    assert list(read_events(tmp_path / "absent")) == []


def test_writers_at_once_do_not_mix_lines(tmp_path):
    path = tmp_path / "events.jsonl"

    def write(writer):
        for index in range(100):
            append_event(path, {"writer": writer, "index": index, "filler": "x" * 500})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = {(event["writer"], event["index"]) for event in read_events(path)}
    assert len(seen) == 400


def test_summary_is_valid_json_and_replaced_whole(tmp_path):
    run = RunFolder.open(tmp_path, "tune", {})
    run.write_summary({"auc": np.float64(0.9), "bad": float("inf"), "path": tmp_path})
    assert run.read_summary() == {"auc": 0.9, "bad": None, "path": str(tmp_path)}
    run.write_summary({"auc": 1})
    assert json.loads(run.summary_path.read_text()) == {"auc": 1}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_plain_values_survive_json_and_yaml():
    value = {
        "colour": Colour.RED,
        "set": {2, 1},
        "array": np.array([0.5, np.nan]),
        3: np.int64(4),
        "flag": np.bool_(True),
        "crops": Crops(),
    }
    plain = json_ready(value)
    assert plain == {
        "colour": "red",
        "set": [1, 2],
        "array": [0.5, None],
        "3": 4,
        "flag": True,
        "crops": {"sizes": [224, 96], "out": "/data/x"},
    }
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert config_changes(CONFIG, yaml.safe_load(yaml.safe_dump(json_ready(CONFIG)))) == []
