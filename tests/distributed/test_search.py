from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

from benchmarks.made_study import make_study
from cytoray.distributed.cluster import Shared
from cytoray.distributed.search import AshaByGroup, Halving, run_search
from cytoray.distributed.trials import MetricsFile, SearchSettings, TrialSpec, read_result
from cytoray.distributed.tuner import PacedTrial, pool_size
from cytoray.errors import InputError
from cytoray.io import atomic_write_text
from cytoray.mil import MILConfig, open_bags
from cytoray.mil.cohort import read_cohort, read_features
from cytoray.mil.folds import make_folds
from cytoray.mil.selection import best_result
from cytoray.progress import Progress


def spec_of(key: str, folder, *, fold: str = "", **config) -> TrialSpec:
    return TrialSpec(
        key=key, candidate=key, config=MILConfig(**config), encoder=0, fold=fold,
        folder=str(folder / key),
    )  # fmt: skip


def test_a_trial_is_finished_when_its_result_is_there(tmp_path) -> None:
    assert read_result(tmp_path / "a") is None
    atomic_write_text(tmp_path / "a" / "result.json", '{"key": "a"}')
    assert read_result(tmp_path / "a") == {"key": "a"}


def test_metrics_of_a_second_attempt_go_on_after_the_first(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    first.log({"loss": 0.5, "auc": float("nan")}, 1)
    first.log({"loss": 0.4}, 2)
    with path.open("a") as stream:
        stream.write('{"step": 3, "tor')
    second = MetricsFile(path)
    for step in range(1, 4):
        second.log({"loss": 1 / step}, step)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if line.endswith("}")] == [1, 2, 3]
    assert json.loads(lines[0])["metrics"] == {"loss": 0.5}


def course(epochs: int, seen: list):
    """A trial whose validation AUC falls from epoch to epoch."""

    def run(on_epoch):
        for epoch in range(1, epochs + 1):
            seen.append(epoch)
            if on_epoch is not None and on_epoch({"epoch": epoch, "val_auc": 1 / epoch}):
                break
        return {"val": {"auc": 1.0}, "best_epoch": 1}

    return run


def test_a_paced_trial_waits_at_its_rungs() -> None:
    seen: list[int] = []
    trial = PacedTrial(course(6, seen), [2, 4])
    assert trial.advance() == {"val_auc": 1.0, "epoch": 2, "done": False}
    time.sleep(0.05)
    assert seen == [1, 2]
    assert trial.advance() == {"val_auc": 1.0, "epoch": 4, "done": False}
    assert trial.advance() == {"done": True}
    assert seen == [1, 2, 3, 4, 5, 6]
    seen.clear()
    trial = PacedTrial(course(6, seen), [2, 4])
    trial.advance()
    assert trial.stop() == {"done": True}
    assert seen == [1, 2]


def test_what_goes_wrong_in_a_paced_trial_is_told_or_raised() -> None:
    def wrong(error):
        def run(on_epoch):
            raise error

        return run

    assert PacedTrial(wrong(InputError("no bag")), []).advance()["failure"] == "no bag"
    assert PacedTrial(wrong(InputError("no bag")), [1]).advance()["failure"] == "no bag"
    for rungs in ([], [1]):
        with pytest.raises(RuntimeError, match="broken"):
            PacedTrial(wrong(RuntimeError("broken")), rungs).advance()


def test_halving_compares_within_a_fold_alone(tmp_path) -> None:
    halving = Halving(grace_epochs=2, reduction=2.0)
    assert halving.rungs(9) == [2, 4, 8]
    specs = {
        name: spec_of(name, tmp_path, fold=name[0], epochs=9) for name in ("a1", "a2", "a3", "b1")
    }
    judge = AshaByGroup(specs, halving)
    for name in specs:
        judge.add(name)
    assert judge.goes_on("a1", {"epoch": 2, "val_auc": 0.9})
    assert not judge.goes_on("a2", {"epoch": 2, "val_auc": 0.5})
    assert judge.goes_on("b1", {"epoch": 2, "val_auc": 0.4}), "another fold"
    assert judge.goes_on("a3", {"epoch": 2, "val_auc": 0.95})


def test_halving_knows_the_trials_of_an_earlier_start(tmp_path) -> None:
    specs = {name: spec_of(name, tmp_path, epochs=9) for name in ("old", "new")}
    history = [{"epoch": epoch, "val_auc": 0.9} for epoch in range(1, 10)]
    judge = AshaByGroup(specs, Halving(grace_epochs=2, reduction=2.0),
                        [{"key": "old", "history": history}])  # fmt: skip
    judge.add("new")
    assert not judge.goes_on("new", {"epoch": 2, "val_auc": 0.6})


@pytest.fixture(scope="module")
def settings(ray_cluster, tmp_path_factory) -> SearchSettings:
    index, bags = make_study(tmp_path_factory.mktemp("study"), 32, signal=3.0)
    store = open_bags(bags)
    cohort = read_cohort(index / "slides.parquet", ("label",), [store])
    folds = make_folds(
        cohort.labels, cohort.groups, folds=2, val_fraction=0.3, test_fraction=0.3, seed=0
    )
    return SearchSettings(
        cohort=Shared(cohort),
        folds={fold.name: fold for fold in folds},
        features=(Shared(read_features(store, cohort.slide_ids)),),
        encoders=("",),
        cpus_per_trial=0.5,
    )


@pytest.mark.ray
def test_few_processes_run_many_trials_and_none_twice(settings, tmp_path) -> None:
    specs = [
        spec_of(f"{name}-{fold}-{lr}", tmp_path, fold=fold, aggregator=name, lr=lr, epochs=2)
        for fold in ("fold0", "fold1")
        for name in ("mean", "max")
        for lr in (1e-2, 1e-3)
    ]
    (tmp_path / "bad").write_text("a file stands where its folder should")
    specs.insert(4, spec_of("bad", tmp_path, fold="fold0", epochs=2))
    seen: list[str] = []
    with Progress("t") as progress:
        options = {"progress": progress, "max_concurrent": 2}
        first = run_search(specs[:3], settings, tmp_path, **options)[0]
        times = {s.key: os.stat(tmp_path / s.key / "result.json").st_mtime_ns for s in specs[:3]}
        results, failed = run_search(
            specs, settings, tmp_path, on_result=lambda r: seen.append(r["key"]), **options
        )
    assert [r["key"] for r in results][:3] == [r["key"] for r in first]
    for key, before in times.items():
        assert os.stat(tmp_path / key / "result.json").st_mtime_ns == before
    done = {r["key"] for r in results}
    assert done == {s.key for s in specs} - {"bad"}
    assert list(failed) == ["bad"]
    assert failed["bad"].startswith("FileExistsError: ")
    assert sorted(seen) == sorted(done)
    assert {r["fold"] for r in results} == {"fold0", "fold1"}
    assert best_result(results)["val"]["auc"] > 0.9
    assert all(np.isfinite(r["val_loss"]) for r in results)


@pytest.mark.ray
def test_bad_trials_end_early_and_leave_their_result(settings, tmp_path) -> None:
    specs = [
        spec_of(
            f"lr{lr}",
            tmp_path,
            fold="fold0",
            aggregator="mean",
            lr=lr,
            epochs=8,
            patience=0,
            min_lr=0.0,
            seed=2,
        )
        for lr in (1e-2, 1e-9, 2e-9)
    ]
    with Progress("t") as progress:
        results, failed = run_search(
            specs, settings, tmp_path, progress=progress, max_concurrent=1,
            halving=Halving(grace_epochs=4, reduction=2.0),
        )  # fmt: skip
    assert failed == {}
    assert [r["stopped"] for r in results] == [False, True, True]
    assert [r["epochs"] for r in results] == [8, 4, 4]
    assert best_result(results)["key"] == "lr0.01"


@pytest.mark.ray
def test_as_many_trials_at_a_time_as_fit_the_cluster(settings) -> None:
    assert pool_size(settings, 0) == 8
    assert pool_size(settings, 3) == 3
