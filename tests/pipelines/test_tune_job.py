from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cytoray.errors import InputError
from cytoray.evaluation import evaluate_scores
from cytoray.mil import MILConfig, load_head, open_bags
from cytoray.slides import read_slide_table
from cytoray.tracking import Tracker
from pipelines import tune

pytestmark = pytest.mark.ray

MIL = MILConfig(epochs=3, patience=0, batch_bags=4, tiles_per_bag=3, eval_tiles=8)


@pytest.fixture(scope="module")
def config(indexed, pretrained, embedded, tracking_uri, tmp_path_factory) -> tune.Config:
    """A grid of two aggregators and two LoRA ranks; two of six training slides to validate on."""
    return tune.Config(
        bags=Path(embedded.summary["bags"]),
        index=indexed.out,
        encoder=pretrained.summary["encoder"],
        out=tmp_path_factory.mktemp("tune") / "run",
        lora_ranks=(0, 2),
        mil=MIL,
        lora_epochs=1,
        val_fraction=0.34,
        model_name="tests-head",
        tracking_uri=tracking_uri,
    )


@pytest.fixture(scope="module")
def tuned(config):
    """What the job returned."""
    return tune.run(config)


def trial_results(out: Path) -> dict[str, dict]:
    paths = (out / "trials").glob("*/result.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def test_every_trial_of_the_grid_ran(config, tuned) -> None:
    results = trial_results(config.out)
    found = {(r["config"]["aggregator"], r["config"]["lora_rank"]) for r in results.values()}
    assert found == {("mean", 0), ("mean", 2), ("abmil", 0), ("abmil", 2)}
    assert (tuned["num_trials"], tuned["failed"]) == (4, {})
    for key, result in results.items():
        assert result["key"] == key
        epochs = config.lora_epochs if result["config"]["lora_rank"] else MIL.epochs
        assert [record["epoch"] for record in result["history"]][-1] == epochs
        assert np.isfinite([record["val_loss"] for record in result["history"]]).all()
        head = load_head(config.out / "trials" / key / "head")
        assert bool(head.lora_state) == (result["config"]["lora_rank"] > 0)


def test_the_best_is_chosen_by_validation_alone(config, tuned) -> None:
    results = trial_results(config.out)
    ranks = {key: (r["val"]["auc"] or -1, -r["val_loss"]) for key, r in results.items()}
    assert tuned["best"] == max(ranks, key=lambda key: ranks[key])
    assert tuned["val_auc"] == results[tuned["best"]]["val"]["auc"]
    names = [path.name for path in (config.out / "head").iterdir()]
    assert len(names) >= 2
    for name in names:
        theirs = config.out / "trials" / tuned["best"] / "head" / name
        assert (config.out / "head" / name).read_bytes() == theirs.read_bytes()


def test_the_held_out_slides_are_scored_once(config, tuned, indexed) -> None:
    rows = json.loads((config.out / "heldout.json").read_text())
    table = read_slide_table(indexed.out / "slides.parquet").to_pylist()
    slides = {row["slide_id"]: row for row in table}
    assert {r["slide_id"] for r in rows} == {s for s, r in slides.items() if r["split"] == "test"}
    store = open_bags(config.bags)
    for row in rows:
        assert row["label"] == str(slides[row["slide_id"]]["label"])
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["tile_ids"] == list(store.read(row["slide_id"]).tile_ids)
        assert len(row["attention"]) == len(row["tile_ids"])
        assert sum(row["attention"]) == pytest.approx(1, abs=1e-3)
    labels = np.array([int(r["label"]) for r in rows])
    scores = np.array([[r["probabilities"]["0"], r["probabilities"]["1"]] for r in rows])
    assert tuned["auc_heldout"] == pytest.approx(evaluate_scores(labels, scores)["auc"])
    assert tuned["num_heldout"] == 2
    low, high = tuned["auc_ci"]
    assert low <= tuned["auc_heldout"] <= high
    assert Path(tuned["report"]).stat().st_size > 10_000


def test_mlflow_has_a_parent_four_children_and_the_model(config, tuned, tracking_uri) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(tracking_uri)
    assert tracker.get_run(tuned["mlflow_run_id"]).status == "FINISHED"
    children = tracker.child_runs(tuned["mlflow_run_id"])
    results = trial_results(config.out)
    assert sorted(child.name for child in children) == sorted(results)
    for child in children:
        assert child.status == "FINISHED"
        assert child.params["lora_rank"] == str(results[child.name]["config"]["lora_rank"])
        assert child.metrics["val_loss"] == pytest.approx(
            results[child.name]["history"][-1]["val_loss"], rel=1e-4
        )
    [version] = MlflowClient(tracking_uri).search_model_versions("name = 'tests-head'")
    assert (str(version.version), version.run_id) == ("1", tuned["mlflow_run_id"])
    assert tuned["registered_model"] == "tests-head version 1"


def test_resume_runs_nothing_again_and_leaves_no_doubles(config, tuned, tracking_uri) -> None:
    results = config.out / "trials"
    before = {p: p.stat().st_mtime_ns for p in results.glob("*/result.json")}
    again = tune.run(replace(config, resume=True))
    assert {p: p.stat().st_mtime_ns for p in results.glob("*/result.json")} == before
    for name in ("best", "auc_heldout", "auc_ci", "mlflow_run_id", "registered_model"):
        assert again[name] == tuned[name]
    tracker = Tracker(tracking_uri)
    children = tracker.child_runs(tuned["mlflow_run_id"])
    assert [child.status for child in children] == ["FINISHED"] * 4


@pytest.mark.slow
def test_a_failing_trial_does_not_stop_the_others(config, tracking_uri, tmp_path) -> None:
    """A training slide is gone: the trial that reads its tiles fails, the one on bags does not."""
    table = read_slide_table(config.index / "slides.parquet")
    place = table.column("split").to_pylist().index("train")
    paths = table.column("path").to_pylist()
    paths[place] = str(tmp_path / "gone.svs")
    column = table.column_names.index("path")
    pq.write_table(table.set_column(column, "path", [paths]), tmp_path / "slides.parquet")
    out = tmp_path / "run"
    grid = replace(config, index=tmp_path, out=out, aggregators=("mean",), model_name="tests-one")
    summary = tune.run(grid)
    [(failed, reason)] = summary["failed"].items()
    assert failed.startswith("mean-r2-")
    assert "missing_file" in reason
    assert summary["best"].startswith("mean-r0-")
    assert set(trial_results(out)) == {summary["best"]}
    children = {c.name: c for c in Tracker(tracking_uri).child_runs(summary["mlflow_run_id"])}
    assert children[failed].status == "FAILED"
    assert "missing_file" in children[failed].tags["cytoray.error"]
    assert children[summary["best"]].status == "FINISHED"


def test_a_patient_in_two_parts_is_refused(config, tmp_path) -> None:
    table = read_slide_table(config.index / "slides.parquet")
    splits = table.column("split").to_pylist()
    patients = table.column("patient_id").to_pylist()
    patients[splits.index("test")] = patients[splits.index("train")]
    column = table.column_names.index("patient_id")
    pq.write_table(table.set_column(column, "patient_id", [patients]), tmp_path / "slides.parquet")
    with pytest.raises(InputError, match=patients[splits.index("train")]):
        tune.run(replace(config, index=tmp_path, out=tmp_path / "o"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "grade"}, r"unknown label column 'grade'; valid: label$"),
        ({"label": "vendor"}, r"unknown label column 'vendor'"),
        ({"encoder": "vit_tiny_patch16_224", "pretrained": False}, r"bags were made by encoder"),
        ({"encoder": "vit_tinny_patch16_224"}, r"did you mean vit_tiny_patch16_224"),
        ({"cpus_per_trial": 9.0}, r"CPU: 9 needed at once, the cluster has 4 \(5 missing\)"),
        ({"gpus_per_trial": 0.5}, r"GPU: 0\.5 needed at once, the cluster has 0"),
        ({"bags": Path("/nowhere")}, r"no folder of bags at /nowhere"),
    ],
)
def test_grids_that_cannot_be_are_refused_before_anything_is_written(
    config, tmp_path, changes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tune.run(replace(config, out=tmp_path / "o", **changes))
    assert not (tmp_path / "o").exists()
