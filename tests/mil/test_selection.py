from __future__ import annotations

import math

import pytest

from cytoray.mil.selection import best_by_fold, best_result, over_folds


def result(key: str, auc: float | None, loss: float, fold: str = "", **more) -> dict:
    return {
        "key": key, "candidate": key.split("@")[0], "fold": fold, "val": {"auc": auc},
        "val_loss": loss, "best_epoch": 2, "seconds": 1.5, "stopped": False, **more,
    }  # fmt: skip


def test_best_is_by_auc_then_by_loss() -> None:
    results = [result("a", 0.7, 0.1), result("b", 0.9, 0.6), result("c", 0.9, 0.5)]
    assert best_result(results)["key"] == "c"
    assert best_result(results[:2])["key"] == "b"


def test_an_auc_that_does_not_exist_is_the_worst() -> None:
    """One class alone in the validation part: JSON holds null for its AUC."""
    results = [result("a", None, 0.01), result("b", 0.2, 3.0)]
    assert best_result(results)["key"] == "b"
    assert best_result([result("a", None, 2.0), result("b", None, 1.0)])["key"] == "b"


def test_a_trial_that_was_stopped_is_no_choice() -> None:
    results = [result("a", 0.9, 0.1, stopped=True), result("b", 0.8, 0.2)]
    assert best_result(results)["key"] == "b"
    assert best_result(results[:1])["key"] == "a"


def test_each_fold_chooses_for_itself() -> None:
    results = [result("a@0", 0.9, 0.1, "fold0"), result("b@0", 0.8, 0.1, "fold0"),
               result("a@1", 0.6, 0.1, "fold1"), result("b@1", 0.7, 0.1, "fold1")]  # fmt: skip
    assert {fold: best["key"] for fold, best in best_by_fold(results).items()} == {
        "fold0": "a@0",
        "fold1": "b@1",
    }
    rows = over_folds(results, 2)
    assert [row["candidate"] for row in rows] == ["a", "b"], "equal means: the order stays"
    assert [row["val_auc"] for row in rows] == pytest.approx([0.75, 0.75])
    assert rows[0]["seconds"] == 3.0
    assert all(row["complete"] for row in rows)


def test_candidates_that_lack_folds_come_last() -> None:
    results = [result("a@0", 0.9, 0.1, "fold0"),
               result("b@0", 0.6, 0.1, "fold0"), result("b@1", 0.5, 0.1, "fold1"),
               result("c@0", 0.8, 0.1, "fold0", stopped=True), result("c@1", 0.8, 0.1, "fold1"),
               result("d@0", None, 0.1, "fold0"), result("d@1", None, 0.1, "fold1")]  # fmt: skip
    rows = over_folds(results, 2)
    assert [row["candidate"] for row in rows] == ["b", "d", "a", "c"]
    assert math.isnan(rows[1]["val_auc"])
    assert math.isnan(rows[2]["val_auc_low"])
    assert rows[3]["stopped"] == 1
