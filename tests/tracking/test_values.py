import json
from pathlib import Path

import pytest

from cytoray.errors import InputError
from cytoray.tracking.values import (
    check_artifacts,
    clean_name,
    content_hash,
    flatten_params,
    key_value,
    resolve_uri,
)


def test_default_uri_is_absolute(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None, tmp_path) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///sub/a.db") == f"sqlite:///{tmp_path.resolve()}/sub/a.db"
    assert resolve_uri("a.db") == f"sqlite:///{tmp_path.resolve()}/a.db"


def test_environment_names_the_server(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert resolve_uri(None, tmp_path) == "http://tracking:5000"
    assert resolve_uri("sqlite:////x/y.db") == "sqlite:////x/y.db"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns"])
def test_folder_stores_are_refused_with_the_fix(uri):
    with pytest.raises(InputError, match="sqlite:///"):
        resolve_uri(uri)


def test_params_are_flat_short_text():
    params = {
        "model": {"lora": {"rank": 4}, "name": "vit"},
        "crops": (224, 96),
        "path": Path("/a/b"),
        "long": "x" * 2000,
        "empty": {},
        "a=b?": None,
    }
    flat = flatten_params(params)
    assert flat["model.lora.rank"] == "4"
    assert json.loads(flat["crops"]) == [224, 96]
    assert flat["path"] == "/a/b"
    assert len(flat["long"]) == 500
    assert flat["long"].endswith("...")
    assert flat["empty"] == "{}"
    assert flat["a_b_"] == "None"


def test_unquotable_keys_are_hashed():
    assert key_value("pretrain:/data/run 1") == "pretrain:/data/run 1"
    quoted = key_value("o'brien")
    assert quoted.startswith("sha256:")
    assert quoted != key_value("o'brian")
    assert len(key_value("k" * 5000)) < 100


def test_clean_name_keeps_what_mlflow_accepts():
    assert clean_name("loss/dino (mean)") == "loss/dino _mean_"
    assert clean_name("/") == "_"


def test_patient_data_is_not_an_artifact(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert [file.name for file in check_artifacts(tmp_path)] == ["model.safetensors"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "slide.PNG").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"slide\.PNG may hold patient data"):
        check_artifacts(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_artifacts(tmp_path / "absent")


def test_content_hash_is_of_names_and_bytes(tmp_path):
    for folder, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.json").write_bytes(data)
    a, b, c = (content_hash([tmp_path / f / "m.json"], tmp_path / f) for f in "abc")
    assert a == b
    assert a != c
