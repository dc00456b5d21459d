from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from benchmarks.made_study import make_bags, make_index, make_study
from cytoray.distributed.cluster import Shared
from cytoray.distributed.prefixes import share_prefixes
from cytoray.distributed.trials import TrialSpec, run_trial
from cytoray.errors import InputError, SlideError
from cytoray.evaluation import evaluate_scores
from cytoray.mil import MILConfig, load_head, open_bags
from cytoray.models.encoder import load_encoder
from cytoray.progress import Progress
from cytoray.slides import read_slide_table
from cytoray.tracking import Tracker
from pipelines import tune
from pipelines.tune_search import prepare, search_settings

pytestmark = pytest.mark.ray

MIL = MILConfig(epochs=3, patience=0, batch_bags=4, tiles_per_bag=3, eval_tiles=8)


@pytest.fixture(scope="module")
def config(indexed, pretrained, embedded, tracking_uri, tmp_path_factory) -> tune.Config:
    """A grid of two aggregators and two LoRA ranks; two of six training slides to validate on."""
    return tune.Config(
        bags=(Path(embedded.summary["bags"]),),
        index=indexed.out,
        encoder=(pretrained.summary["encoder"],),
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
    store = open_bags(config.bags[0])
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
    board = json.loads((config.out / "leaderboard.json").read_text())
    assert board["best"] == tuned["best"]
    assert board["rows"][0]["candidate"] == tuned["best"]
    assert "held-out AUC" in (config.out / "leaderboard.html").read_text()
    assert len((config.out / "leaderboard.csv").read_text().splitlines()) == 5


def test_mlflow_has_a_parent_four_children_and_the_model(config, tuned, tracking_uri) -> None:
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


def test_lora_trials_share_the_output_of_frozen_blocks(config, tuned, tmp_path) -> None:
    """A trial gives the same with what is shared, and reads no slide then."""
    [note] = tuned["frozen_blocks"]
    assert re.search(r"0 frozen blocks: output for \d+ tiles of 2 slides computed once", note)
    mil = replace(MIL, augment=False, eval_tiles=4)
    search = prepare(replace(config, aggregators=("mean",), lora_ranks=(2,), lora_blocks=(1,),
                             mil=mil))  # fmt: skip
    settings = search_settings(config, search)
    [candidate], [fold] = search.candidates, search.folds
    specs = [
        TrialSpec(key=key, candidate=key, config=candidate.config, encoder=0, fold=fold.name,
                  folder=str(tmp_path / key))
        for key in ("plain", "shared")
    ]  # fmt: skip
    with Progress("tests") as progress:
        shared = share_prefixes(specs, settings, progress)
        none = share_prefixes(specs, settings, progress, limit_gb=0)
        [(place, prefix)] = shared.prefixes.items()
        token_bytes = prefix.load(search.cohort.slide_ids[fold.val[0]])[0].nbytes
        few_gb = 4 * len(fold.val) * token_bytes / 1e9
        few = share_prefixes(specs, settings, progress, limit_gb=few_gb)
        less = share_prefixes(specs, settings, progress, limit_gb=few_gb * 0.9)
    depth = len(load_encoder(config.encoder[0]).model.blocks) - 1
    assert place == (0, depth)
    assert set(prefix.tiles) == set(search.cohort.ids([*fold.train, *fold.val]))
    assert {len(tiles) for tiles in few.prefixes[place].tiles.values()} == {4}
    assert set(few.prefixes[place].tiles) == set(search.cohort.ids(fold.val))
    assert (none.prefixes, none.prefix_notes) == ({}, ())
    assert less.prefixes == {}
    assert "each of 2 trials computes their output anew" in less.prefix_notes[0]
    plain = run_trial(specs[0], settings)
    gone = settings.plan.get()
    lost = gone.slides.set_column(
        gone.slides.column_names.index("path"), "path", [["/gone.svs"] * len(gone.slides)]
    )
    unread = replace(shared, plan=Shared(replace(gone, slides=lost)))
    again = run_trial(specs[1], unread)
    assert [r["epoch"] for r in again["history"]] == [r["epoch"] for r in plain["history"]]
    for before, after in zip(plain["history"], again["history"], strict=True):
        assert after["val_loss"] == pytest.approx(before["val_loss"], abs=2e-3)
    with pytest.raises(SlideError, match="missing_file"):
        run_trial(specs[1], replace(unread, prefixes={}))
    with Progress("tests") as progress:
        failed = share_prefixes(specs, unread, progress)
    assert "not kept for" in failed.prefix_notes[0]
    assert "missing_file" in failed.prefix_notes[0]
    assert failed.prefixes[place].tiles == {}


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
        ({"label": ("grade",)}, r"unknown label column 'grade'; valid: label$"),
        ({"label": ("vendor",)}, r"unknown label column 'vendor'"),
        ({"encoder": ("vit_tiny_patch16_224",), "pretrained": False}, r"bags were made by enc"),
        ({"encoder": ("vit_tinny_patch16_224",)}, r"did you mean vit_tiny_patch16_224"),
        ({"encoder": ()}, r"--encoder must name the encoders"),
        ({"group": "batch"}, r"unknown group column 'batch'"),
        ({"folds": 5}, r"class '[01]' counts 4 patients"),
        ({"space": Path("/gone.yaml")}, r"cannot read the search space /gone.yaml"),
        ({"lora_blocks": (99,)}, r"LoRA on the last 99 blocks: .* has \d+; 0 means all"),
        ({"prefix_gb": -1.0}, r"--prefix-gb must be 0 or more"),
        ({"cpus_per_trial": 9.0}, r"CPU: 9 needed at once, the cluster has 4 \(5 missing\)"),
        ({"gpus_per_trial": 0.5}, r"GPU: 0\.5 needed at once, the cluster has 0"),
        ({"bags": (Path("/nowhere"),)}, r"no folder of bags at /nowhere"),
    ],
)
def test_grids_that_cannot_be_are_refused_before_anything_is_written(
    config, tmp_path, changes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tune.run(replace(config, out=tmp_path / "o", **changes))
    assert not (tmp_path / "o").exists()


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(tmp_path, capsys) -> None:
    index, bags = make_study(tmp_path, 24)
    config = tune.Config(bags=(bags,), index=index, out=tmp_path / "o", lora_ranks=(0,), folds=3,
                         aggregators=("mean", "abmil"), lrs=(1e-3, 1e-4), dry_run=True)  # fmt: skip
    plan = tune.run(config)
    assert (plan["trials"], plan["candidates"], plan["slides"]) == (12, 4, 24)
    assert "nothing was started" in capsys.readouterr().out
    assert not (tmp_path / "o").exists()


def board_of(out: Path) -> dict:
    return json.loads((out / "leaderboard.json").read_text())


def test_folds_encoders_and_several_labels_at_once(ray_cluster, tracking_uri, tmp_path) -> None:
    """Two encoders, two tasks, one of them with missing labels, three folds, at random, ASHA."""
    rng = np.random.default_rng(0)
    rows, labels = [], {}
    for i in range(48):
        slide_id, label = f"s{i:02d}", (i // 2) % 2
        other = "abc"[int(rng.integers(3))] if i % 4 else None
        rows.append({"slide_id": slide_id, "patient_id": f"p{i // 2}", "label": label,
                     "other": other, "image": f"i{i // 4}"})  # fmt: skip
        labels[slide_id] = label
    index = make_index(tmp_path, rows, {"label": pa.int64(), "other": pa.string(),
                                        "image": pa.string()})  # fmt: skip
    good = make_bags(tmp_path / "good", labels, signal=4.0, encoder_id="good")
    bad = make_bags(tmp_path / "bad", labels, signal=0.0, encoder_id="bad", seed=1)
    (tmp_path / "space.yaml").write_text("lr: {min: 1e-3, max: 1e-2, log: true}\n")
    config = tune.Config(
        bags=(good, bad), index=index, out=tmp_path / "run", label=("label", "other"),
        group="image", aggregators=("mean", "abmil"), lora_ranks=(0,),
        space=tmp_path / "space.yaml",
        search="random", num_samples=2, folds=3, asha=True, grace_epochs=2, reduction=2.0,
        mil=MILConfig(epochs=5, balanced_sampling=True), calibrate=True, max_concurrent=2,
        model_name="tests-folds", tracking_uri=tracking_uri,
    )  # fmt: skip
    summary = tune.run(config)
    assert (summary["num_candidates"], summary["num_trials"]) == (4, 12)
    assert summary["failed"] == {}
    board = board_of(config.out)
    assert set(board["tests"]) == {"label", "other"}
    assert board["tests"]["label"]["num"] == 48
    assert board["tests"]["other"]["num"] == 36
    assert board["tests"]["label"]["metrics"]["auc"]["point"] > 0.8, "each fold chose `good`"
    assert set(summary["chosen"]) == {"fold0", "fold1", "fold2"}
    rows = json.loads((config.out / "heldout.json").read_text())
    assert sorted(row["slide_id"] for row in rows) == sorted(labels)
    folds = {row["slide_id"]: row["fold"] for row in rows}
    assert all(folds[f"s{i:02d}"] == folds[f"s{i // 4 * 4:02d}"] for i in range(48)), "images whole"
    head = load_head(config.out / "head")
    assert list(head.tasks) == ["label", "other"]
    children = Tracker(tracking_uri).child_runs(summary["mlflow_run_id"])
    assert len(children) == 13, "twelve trials and the head trained on all slides"
    assert {child.status for child in children} == {"FINISHED"}
    (tmp_path / "space.yaml").write_text("lr: [1e-3]\n")
    with pytest.raises(InputError, match="another search space"):
        tune.run(replace(config, resume=True))


@pytest.mark.drill
def test_a_killed_search_goes_on_and_repeats_nothing(start_cytoray, tmp_path) -> None:
    index, bags = make_study(tmp_path, 40, signal=3.0)
    out, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    command = ["tune", "--index", index, "--bags", bags, "--out", out, "--aggregators", "mean",
               "abmil", "--lora-ranks", "0", "--lrs", "1e-2", "1e-3", "1e-4", "1e-5",
               "--mil.epochs", "20", "--max-concurrent", "1", "--tracking-uri", uri,
               "--resume"]  # fmt: skip
    first = start_cytoray(*command)
    first.wait_for(lambda: len(list(out.glob("trials/*/result.json"))) >= 2)
    first.kill()
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/result.json")}
    assert 2 <= len(before) < 8
    second = start_cytoray(*command)
    assert second.process.wait(120) == 0, second.log.read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(trial_results(out)) == 8
    tracker = Tracker(uri)
    summary = json.loads((out / "summary.json").read_text())
    children = tracker.child_runs(summary["mlflow_run_id"])
    assert sorted(child.name for child in children) == sorted(trial_results(out))
    assert {child.status for child in children} == {"FINISHED"}
    for child in children:
        steps = [
            metric.step for metric in MlflowClient(uri).get_metric_history(child.run_id, "val_loss")
        ]
        assert sorted(steps) == list(range(1, len(trial_results(out)[child.name]["history"]) + 1))


def test_bags_that_do_not_belong_are_named(ray_cluster, tracking_uri, tmp_path) -> None:
    index, bags = make_study(tmp_path, 16)
    config = tune.Config(bags=(bags,), index=index, out=tmp_path / "o", lora_ranks=(0,),
                         tracking_uri=tracking_uri)  # fmt: skip
    make_bags(bags, {"stranger": 0})
    with pytest.raises(InputError, match="bag stranger in"):
        tune.run(config)
    make_bags(bags, {"s003": 0}, width=5)
    with pytest.raises(InputError, match=r"bag stranger in(.|\n)*bag s003: width 5, bag s000"):
        tune.run(config)
    (bags / "slide_id=stranger" / "bag.parquet").unlink()
    with pytest.raises(InputError, match="bag s003: width 5, bag s000 has 16"):
        tune.run(config)
    with pytest.raises(InputError, match=r"2 labels at once need aggregators of several tasks"):
        tune.run(replace(config, label=("label", "x"), aggregators=("clam",)))
    with pytest.raises(InputError, match="name one encoder for each of the 1 --bags"):
        replace(config, encoder=("a", "b"))
    assert not (tmp_path / "o").exists()
