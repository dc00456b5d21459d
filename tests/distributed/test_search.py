from __future__ import annotations

import numpy as np

from cytoray.distributed.search import Cohort, TrialSpec, best_result, read_result
from cytoray.io import atomic_write_text
from cytoray.mil import MILConfig


def result(key: str, auc: float | None, loss: float) -> dict:
    return {"key": key, "val": {"auc": auc}, "val_loss": loss}


def test_best_is_by_auc_then_by_loss() -> None:
    results = [result("a", 0.7, 0.1), result("b", 0.9, 0.6), result("c", 0.9, 0.5)]
    assert best_result(results)["key"] == "c"
    assert best_result(results[:2])["key"] == "b"


def test_an_auc_that_does_not_exist_is_the_worst() -> None:
    """One class alone in the validation part: JSON holds null for its AUC."""
    results = [result("a", None, 0.01), result("b", 0.2, 3.0)]
    assert best_result(results)["key"] == "b"
    assert best_result([result("a", None, 2.0), result("b", None, 1.0)])["key"] == "b"


def test_a_trial_is_finished_when_its_result_is_there(tmp_path) -> None:
    spec = TrialSpec(key="a", config=MILConfig(), folder=str(tmp_path / "a"), run_id="")
    assert read_result(spec) is None
    atomic_write_text(tmp_path / "a" / "result.json", '{"key": "a"}')
    assert read_result(spec) == {"key": "a"}


def test_bags_of_a_part() -> None:
    cohort = Cohort(
        slide_ids=["x", "y", "z"],
        labels=np.array([0, 1, 1]),
        patients=["1", "2", "3"],
        parts={"train": np.array([0, 2]), "test": np.array([1])},
        classes=("no", "yes"),
        features=[np.full((n, 2), n, np.float16) for n in (1, 2, 3)],
        tile_ids=[("a",), ("b", "c"), ("d", "e", "f")],
        encoder_id="e",
    )
    train = cohort.bags("train")
    assert [bag.slide_id for bag in train] == cohort.ids("train") == ["x", "z"]
    assert [bag.label for bag in train] == [0, 1]
    assert [len(bag.features) for bag in train] == [1, 3]
