from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cytoray.errors import InputError
from cytoray.evaluation import bootstrap_ci, compare_paired
from cytoray.mil import Bag, BagMeta, write_bag
from cytoray.slides.quarantine import read_quarantine
from cytoray.tracking import Tracker
from pipelines import evaluate

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(ray_cluster, labelled_cells, tiny_encoder, tracking_uri, tmp_path_factory):
    return evaluate.Config(
        cells=labelled_cells,
        out=tmp_path_factory.mktemp("evaluate") / "run",
        encoders=(str(tiny_encoder), "colour-histogram"),
        shots=(1, 4),
        shot_seeds=(0, 1),
        map_method="pca",
        attention_images=3,
        num_draws=100,
        tracking_uri=tracking_uri,
        gpus_per_task=0.0,
    )


@pytest.fixture(scope="module")
def evaluated(config):
    return evaluate.run(config)


def answers(out: Path, encoder: str, probe: str) -> pd.DataFrame:
    frame = pd.read_csv(out / "predictions.csv")
    return frame[(frame["encoder"] == encoder) & (frame["probe"] == probe)]


def test_every_probe_of_every_encoder_has_its_row(config, evaluated) -> None:
    table = pd.read_csv(config.out / "table.csv")
    assert len(table) == len(evaluated["table"]) == 8
    assert evaluated["failed"] == {}
    for row in evaluated["table"]:
        mine = answers(config.out, row["encoder"], row["probe"])
        assert row["accuracy"] == pytest.approx((mine["label"] == mine["predicted"]).mean())
        labels = mine["label"].map({"big": 0, "pale": 1, "red": 2}).to_numpy()
        scores = mine[["p_big", "p_pale", "p_red"]].to_numpy()
        low, high, _ = bootstrap_ci(labels, scores, mine["group"].to_numpy(), "accuracy", n=100)
        assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((low, high))
    best = max(row["accuracy"] for row in evaluated["table"])
    assert best > 0.8  # colours tell the classes


def test_encoders_are_compared_in_pairs(config, evaluated) -> None:
    assert [pair["probe"] for pair in evaluated["comparisons"]] == list(config.probes)
    pair = evaluated["comparisons"][0]
    frames = [answers(config.out, pair[which], pair["probe"]) for which in ("first", "second")]
    labels = frames[0]["label"].map({"big": 0, "pale": 1, "red": 2}).to_numpy()
    scores = [frame[["p_big", "p_pale", "p_red"]].to_numpy() for frame in frames]
    groups = frames[0]["group"].to_numpy()
    expected = compare_paired(labels, *scores, groups, "accuracy", n=100)
    assert pair["difference"] == pytest.approx(expected.difference)
    assert pair["p_value"] == pytest.approx(expected.p_value, abs=0.03)
    assert pair["p_adjusted"] >= pair["p_value"]


def test_few_shot_curves_maps_attention_and_classes_are_there(config, evaluated) -> None:
    points = {(p["probe"], p["shots"]) for p in evaluated["few_shot"]}
    assert points == {(p, n) for p in ("linear", "simple_shot") for n in (1, 4)}
    results = json.loads((config.out / "results.json").read_text())
    places = {k: config.out / v for k, v in results["pieces"].items()}
    num_test = sum(row["test"] for row in evaluated["parts"])
    maps = [np.load(v / "map.npy") for k, v in places.items() if k.startswith("map ")]
    assert [m.shape for m in maps] == [(num_test, 2)] * 2
    [attention] = [v / "attention.npy" for k, v in places.items()
                   if k.startswith("attention ") and (v / "attention.npy").exists()]  # fmt: skip
    assert np.load(attention).shape == (3, 4, 4)
    for probe in results["probes"]:
        assert np.sum(probe["confusion"]) == num_test
        assert [row["name"] for row in probe["per_class"]] == ["big", "pale", "red"]
    page = (config.out / "report.html").read_text()
    for said in ("Few-shot curves", "One encoder against another", "Attention", "colour-histogram"):
        assert said in page


def test_mlflow_has_the_run(config, evaluated, tracking_uri) -> None:
    run = Tracker(tracking_uri).get_run(evaluated["mlflow_run_id"])
    assert run.status == "FINISHED"
    row = evaluated["table"][-1]
    name = f"{row['encoder']}/{row['probe']}/macro_f1"
    assert run.metrics[name] == pytest.approx(row["macro_f1"])


def test_resume_does_nothing_again(config, evaluated) -> None:
    paths = list((config.out / "pieces").glob("*/*"))
    before = {path: path.stat().st_mtime_ns for path in paths}
    again = evaluate.run(replace(config, resume=True))
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    for name in ("table", "comparisons", "mlflow_run_id", "few_shot"):
        assert again[name] == evaluated[name]


@pytest.fixture(scope="module")
def bags(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Bags of 24 slides by a good and a bad encoder, and labels of one slide more."""
    folder, rng = tmp_path_factory.mktemp("bags"), np.random.default_rng(0)
    rows = ["slide_id,label,patient_id"]
    for index in range(24):
        slide, label = f"s{index}", index % 2
        rows.append(f"{slide},{label},p{index}")
        for name, signal in (("good", 3.0), ("bad", 0.0)):
            values = rng.normal(size=(5, 4)) + signal * label
            meta = BagMeta(slide_id=slide, tile_px=64, mpp=0.5, tile_size_level0=64.0,
                           encoder_id=name, encoder_name=name)  # fmt: skip
            ids = tuple(f"{slide}:0.5:64:0_0:{i}" for i in range(5))
            corners = np.zeros((5, 2), np.float32)
            write_bag(folder / name, Bag(values.astype(np.float32), corners, meta, ids))
    (folder / "labels.csv").write_text("\n".join([*rows, "gone,1,p99"]) + "\n")
    return folder / "good", folder / "bad", folder / "labels.csv"


def bag_config(config, made, out: Path, **changes) -> evaluate.Config:
    good, bad, labels = made
    values = {"cells": None, "encoders": (), "bags": (good, bad), "labels": labels, "out": out,
              "probes": ("linear", "knn"), "shots": (2,)}  # fmt: skip
    return replace(config, **(values | changes))


def test_bags_of_slides(config, bags, tmp_path) -> None:
    summary = evaluate.run(bag_config(config, bags, tmp_path / "run"))
    scores = {(row["encoder"], row["probe"]): row["auc"] for row in summary["table"]}
    assert scores["good", "linear"] == 1.0
    assert scores["bad", "linear"] < 1.0
    assert summary["comparisons"][0]["first"] == "good"
    assert (summary["num_left_out"], summary["num_examples"]) == (1, 24)
    [row] = read_quarantine(tmp_path / "run" / "quarantine.parquet").to_pylist()
    assert (row["slide_id"], row["reason_code"]) == ("gone", "no_features")


def test_rows_without_a_label_are_named(config, bags, tmp_path, capsys) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(bags[2].read_text().replace("s3,1,", "s3,,").replace("s8,0,", "s8, ,"))
    settings = bag_config(
        config, bags, tmp_path / "run", labels=table, bags=bags[:1], probes=("knn",), shots=()
    )
    expected = (2, "s3 (line 5), s8 (line 10)")
    plan = evaluate.run(replace(settings, dry_run=True))
    assert (plan["num_unlabelled"], plan["unlabelled"]) == expected
    summary = evaluate.run(settings)
    assert (summary["num_unlabelled"], summary["unlabelled"]) == expected
    assert summary["num_examples"] == 22
    assert "2 rows have no label: s3 (line 5), s8 (line 10)" in capsys.readouterr().err


def test_bags_of_tiles(config, bags, tmp_path) -> None:
    rows = [f"s{i}:0.5:64:0_0:{k},{'ab'[i % 2]}" for i in range(24) for k in range(3)]
    (tmp_path / "tiles.csv").write_text("\n".join(["tile_id,label", *rows]) + "\n")
    changed = bag_config(config, bags, tmp_path / "run", labels=tmp_path / "tiles.csv",
                      bags=bags[:1], probes=("simple_shot",), shots=())  # fmt: skip
    summary = evaluate.run(changed)
    assert (summary["num_examples"], summary["num_groups"]) == (72, 24)
    assert summary["table"][0]["accuracy"] > 0.9
    assert summary["comparisons"] == []


def test_settings_that_cannot_be_are_listed_together() -> None:
    with pytest.raises(InputError) as error:
        evaluate.Config(out=Path("o"), probes=("svm",), metric="acc", map_method="umap")
    text = str(error.value)
    for said in ("either --cells or --bags", "--probes 'svm' is none of knn, simple_shot",
                 "--metric 'acc' is none of", "--map-method 'umap' is none of"):  # fmt: skip
        assert said in text


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(config, bags, tmp_path, capsys) -> None:
    plan = evaluate.run(replace(config, out=tmp_path / "o", dry_run=True))
    assert (plan["examples"], plan["groups"]) == (90, 30)
    assert plan["pieces"] == "8 probe, 4 few_shot, 2 map, 2 attention"
    assert plan["few-shot fits"] == 4 * 2 * 2
    assert "class red" in capsys.readouterr().out
    plan = evaluate.run(bag_config(config, bags, tmp_path / "o", dry_run=True))
    assert plan["encoders"] == "good, bad"
    (tmp_path / "strange.csv").write_text("slide_id,label\nz1,0\nz2,1\n")
    strange = bag_config(config, bags, tmp_path / "o", labels=tmp_path / "strange.csv")
    with pytest.raises(InputError, match=r"not one slide of .* the table has z1, z2, .* of s0, s1"):
        evaluate.run(strange)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": (90,)}, r"class 'big' has \d+ training examples, 90 shots"),
        ({"encoders": ("uni",)}, r"accept the terms at https://huggingface.co/MahmoodLab/UNI"),
        ({"cpus_per_task": 9.0}, r"CPU: 9 needed at once"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_anything_is_written(
    config, tmp_path, monkeypatch, changes, message: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message):
        evaluate.run(replace(config, out=tmp_path / "o", **changes))
    assert not (tmp_path / "o").exists()
