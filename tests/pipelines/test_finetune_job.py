from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file

from cytoray.distributed.finetune import read_answers
from cytoray.errors import InputError
from cytoray.evaluation import evaluate_scores
from cytoray.finetune import TrainConfig, load_classifier, read_adapter, read_image
from cytoray.precision import autocast
from cytoray.slides.quarantine import read_quarantine
from cytoray.tracking import Tracker
from pipelines import finetune

pytestmark = pytest.mark.ray

FAST = TrainConfig(steps_per_shot=4, epochs=4, warmup_steps=2, evaluations=2, augmentation="turns")


@pytest.fixture(scope="module")
def config(ray_cluster, labelled_cells, tiny_encoder, tracking_uri, tmp_path_factory):
    """Three adapters, two amounts, two seeds; one image of the table is not there."""
    table = tmp_path_factory.mktemp("table") / "labels.csv"
    rows = labelled_cells.read_text().splitlines()
    there = [f"{labelled_cells.parent}/{row}" for row in rows[1:]]
    table.write_text("\n".join([rows[0], *there, "gone.png,red,red/99"]) + "\n")
    return finetune.Config(
        cells=table,
        out=tmp_path_factory.mktemp("finetune") / "run",
        encoders=(str(tiny_encoder),),
        adapters=("linear", "lora", "full"),
        shots=(2,),
        shares=(0.5,),
        seeds=(0, 1),
        lrs=(1e-2,),
        train=FAST,
        model_name="tests-cells",
        tracking_uri=tracking_uri,
        gpus_per_trial=0.0,
    )


@pytest.fixture(scope="module")
def tuned(config):
    """What the job returned."""
    return finetune.run(config)


def trial_results(out: Path) -> dict[str, dict]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in (out / "trials").glob("*/result.json")
    }


def test_every_trial_ran_on_as_many_images_as_asked(config, tuned) -> None:
    results = trial_results(config.out)
    assert len(results) == tuned["num_trials"] == 12
    assert tuned["failed"] == {}
    for result in results.values():
        if result["shots"]:
            assert result["num_images"] == 3 * result["shots"] == 6
        else:
            assert result["num_images"] == pytest.approx(sum(tuned_train(tuned)) / 2, abs=2)
        labels = labels_of_test(config)
        scores = evaluate_scores(labels, read_answers(config.out, result["key"]), ("accuracy",))
        assert result["test"]["accuracy"] == pytest.approx(scores["accuracy"])


def tuned_train(tuned) -> list[int]:
    return [row["train"] for row in tuned["parts"]]


def labels_of_test(config) -> np.ndarray:
    frame = pd.read_csv(config.out / "predictions.csv")
    return frame["label"].map({"big": 0, "pale": 1, "red": 2}).to_numpy()


def test_the_image_that_is_not_there_is_quarantined(config, tuned) -> None:
    [row] = read_quarantine(config.out / "quarantine.parquet").to_pylist()
    assert (row["slide_id"], row["stage"], row["reason_code"]) == (
        "gone.png", "finetune", "missing_file",
    )  # fmt: skip
    assert (tuned["num_quarantined"], tuned["num_images"], tuned["exit_code"]) == (1, 90, 0)


def test_the_table_is_of_the_test_part(config, tuned) -> None:
    table = pd.read_csv(config.out / "table.csv")
    assert len(table) == 6
    assert set(table["amount"]) == {"2 shots", "50 %"}
    assert (table["seeds"] == 2).all()
    assert (table["accuracy_low"] <= table["accuracy"]).all()
    assert (table["accuracy"] <= table["accuracy_high"]).all()
    results = trial_results(config.out).values()
    first = table.iloc[0]
    mine = [r["test"]["macro_f1"] for r in results
            if (r["adapter"], r["amount"]) == (first["adapter"], first["amount"])]  # fmt: skip
    assert first["macro_f1"] == pytest.approx(np.mean(mine))
    frame = pd.read_csv(config.out / "predictions.csv")
    assert len(frame) == sum(row["test"] for row in tuned["parts"])
    right = float((frame["label"] == frame["predicted"]).mean())
    assert tuned["best_test"]["accuracy"] == pytest.approx(right)


def test_the_best_is_chosen_by_validation_and_its_encoder_is_plain_timm(config, tuned) -> None:
    results = trial_results(config.out)
    ranks = {key: (r["val"]["accuracy"], -r["val"]["loss"]) for key, r in results.items()}
    assert tuned["best"] == max(ranks, key=lambda key: ranks[key])
    spec = json.loads((config.out / "best" / "encoder" / "encoder.json").read_text())
    model = timm.create_model(spec["architecture"], num_classes=0, **spec["kwargs"]).eval()
    model.load_state_dict(load_file(config.out / "best" / "encoder" / "model.safetensors"))
    classifier = load_classifier(tuned["adapter"])
    frame = pd.read_csv(config.out / "predictions.csv")
    image = torch.from_numpy(read_image(frame["image"][0], 32).copy())[None]
    assert classifier.encoder is not None
    with torch.no_grad(), autocast("auto", image.device):  # as the trial predicted
        features = model(classifier.encoder.prepare(image))
        probabilities = classifier.head(features).float().softmax(1)[0]
    expected = frame[["p_big", "p_pale", "p_red"]].iloc[0].to_numpy(dtype=float)
    np.testing.assert_allclose(probabilities, expected, atol=5e-4)


def test_trials_keep_their_adapters_but_whole_encoders_only_of_the_best(config, tuned) -> None:
    for key, result in trial_results(config.out).items():
        adapter = config.out / "trials" / key / "adapter"
        if result["adapter"] == "full" and key != tuned["best"]:
            assert not adapter.exists()
        elif result["adapter"].startswith("lora"):
            weights, facts = read_adapter(adapter)
            assert facts.adapter.rank == 2
            assert set(weights) >= {"head.weight", "head.bias"}
            assert (adapter / "adapter.safetensors").stat().st_size < 10_000


def test_mlflow_has_a_parent_a_child_a_trial_and_the_model(config, tuned, tracking_uri) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(tracking_uri)
    assert tracker.get_run(tuned["mlflow_run_id"]).status == "FINISHED"
    results = trial_results(config.out)
    children = tracker.child_runs(tuned["mlflow_run_id"])
    assert sorted(child.name for child in children) == sorted(results)
    for child in children:
        result = results[child.name]
        assert child.status == "FINISHED"
        assert child.run_id == result["run_id"]
        assert child.params["adapter.rank"] == str(2 if "lora" in result["adapter"] else 0)
        assert child.metrics["test_accuracy"] == pytest.approx(result["test"]["accuracy"])
        last = result["history"][-1]["val_loss"]
        assert child.metrics["val_loss"] == pytest.approx(last, rel=1e-4)
    [version] = MlflowClient(tracking_uri).search_model_versions("name = 'tests-cells'")
    assert tuned["registered_model"] == f"tests-cells version {version.version}"


def test_the_page_shows_the_run(config, tuned) -> None:
    page = (config.out / "report.html").read_text()
    for said in ("How much data each way needs", "Its surest mistakes", "lora-q.v-r2", "2 shots"):
        assert said in page
    assert page.count("data:image/") == 3


def test_resume_runs_nothing_again(config, tuned, tracking_uri) -> None:
    paths = [*(config.out / "trials").glob("*/result.json"), *config.out.glob("features/*.npy"),
             *config.out.glob("pixels/*.npy")]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in paths}
    again = finetune.run(replace(config, resume=True, strict=True))
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    for name in ("best", "best_test", "table", "mlflow_run_id", "registered_model"):
        assert again[name] == tuned[name]
    assert again["exit_code"] == 3
    assert len(Tracker(tracking_uri).child_runs(tuned["mlflow_run_id"])) == 12


def test_a_trial_that_fails_does_not_stop_the_others(config, tracking_uri, tmp_path) -> None:
    changed = replace(
        config, out=tmp_path / "run", adapters=("linear",), shares=(), seeds=(0,),
        lrs=(1e-2, 1e30), train=replace(FAST, steps_per_shot=20),
    )  # fmt: skip
    summary = finetune.run(changed)
    [(failed, reason)] = summary["failed"].items()
    assert "lr1e+30" in failed
    assert "not finite" in reason
    assert summary["table"][0]["lr"] == 1e-2
    children = Tracker(tracking_uri).child_runs(summary["mlflow_run_id"])
    assert sorted(child.status for child in children) == ["FAILED", "FINISHED"]


@pytest.mark.drill
def test_a_killed_run_goes_on_where_it_was(
    config, tracking_uri, tmp_path, start_cytoray: Callable, cytoray: Callable
) -> None:
    out = tmp_path / "run"
    command = ["finetune", "--cells", config.cells, "--out", out, "--encoders", *config.encoders,
               "--adapters", "linear", "--shots", "2", "4", "--seeds", *map(str, range(6)),
               "--lrs", "1e-2", "--train.steps-per-shot", "200", "--train.evaluations", "2",
               "--gpus-per-trial", "0", "--model-name", "tests-killed",
               "--tracking-uri", tracking_uri, "--resume"]  # fmt: skip
    process = start_cytoray(*command)
    process.wait_for(lambda: len(trial_results(out)) >= 3)
    process.kill()
    before = {key: r["run_id"] for key, r in trial_results(out).items()}
    assert 3 <= len(before) < 12
    times = {key: (out / "trials" / key / "result.json").stat().st_mtime_ns for key in before}
    outcome = cytoray(*command)
    assert outcome.code == 0, outcome.err
    results = trial_results(out)
    assert len(results) == 12
    assert {key: results[key]["run_id"] for key in before} == before
    for key, time_ns in times.items():
        assert (out / "trials" / key / "result.json").stat().st_mtime_ns == time_ns
    summary = json.loads((out / "summary.json").read_text())
    children = Tracker(tracking_uri).child_runs(summary["mlflow_run_id"])
    assert sorted(child.name for child in children) == sorted(results)
    assert {child.status for child in children} == {"FINISHED"}


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(config, tmp_path, capsys) -> None:
    plan = finetune.run(replace(config, out=tmp_path / "o", dry_run=True))
    assert (plan["trials"], plan["images"]) == (12, 91)
    assert "class red" in capsys.readouterr().out
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": (2, 40)}, r"class 'big' has \d+ training examples, 40 shots are asked for"),
        ({"encoders": ("vit_tinny_patch16_224",)}, r"did you mean vit_tiny_patch16_224"),
        ({"encoders": ("random:resnet10t",)}, r"random:resnet10t: LoRA needs a ViT"),
        ({"encoders": ("nope", "/no/e")}, r"'nope' is neither(.|\n)*nothing is at /no/e"),
        ({"cpus_per_trial": 9.0}, r"CPU: 9 needed at once, the cluster has 4"),
        ({"cells": Path("/nowhere")}, r"no folder or CSV of labelled images at /nowhere"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_anything_is_written(
    config, tmp_path, changes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        finetune.run(replace(config, out=tmp_path / "o", **changes))
    assert not (tmp_path / "o").exists()


def test_a_leak_in_the_given_split_is_refused(config, tmp_path) -> None:
    rows = config.cells.read_text().splitlines()
    parts = ["split"] + ["test" if i % 2 else "train" for i in range(len(rows) - 1)]
    table = tmp_path / "a.csv"
    table.write_text("\n".join(f"{r},{p}" for r, p in zip(rows, parts, strict=True)) + "\n")
    with pytest.raises(InputError, match=r"group big/00 is in train and test"):
        finetune.run(replace(config, cells=table, out=tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_settings_that_cannot_be_are_listed_together(config) -> None:
    with pytest.raises(InputError) as error:
        replace(
            config, adapters=("lora:x:2",), shares=(2.0,), lrs=(), fit="zoom",
            encoders=("colour-histogram",),
        )  # fmt: skip
    text = str(error.value)
    for said in ("targets x: valid are q, k, v, o, mlp", "--shares 2", "--lrs needs a value",
                 "'zoom' is none of", "colour-histogram has nothing to adapt"):  # fmt: skip
        assert said in text


def test_the_named_runs_are_the_papers_protocol() -> None:
    from pipelines.runs import NAMED

    first, second = NAMED["finetune"]["dausort"], NAMED["finetune"]["dausort-proportions"]
    assert len(first.encoders) == 5
    assert first.shots == (1, 2, 4, 8, 16, 50)
    assert (len(first.seeds), first.train.batch, first.dropout, first.alpha) == (3, 32, 0.25, 1.0)
    assert finetune.parse_adapter(first.adapters[1]).name == "lora-q.v-r2"
    assert finetune.parse_adapter(second.adapters[0]).name == "lora-q.k.v.o-r16"
    assert (min(second.shares), max(second.shares)) == (0.05, 1.0)
    assert len(finetune.trials_of(first)) == 1050
