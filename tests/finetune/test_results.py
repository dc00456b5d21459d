from __future__ import annotations

import numpy as np
import pytest

from cytoray.evaluation import bootstrap_ci, evaluate_scores, mean_interval
from cytoray.finetune.results import best_trial, chosen_results, result_table

LABELS = np.array([0, 1, 2] * 10)
GROUPS = np.repeat(np.arange(10), 3).astype(str)


def answers(key: str) -> np.ndarray:
    rng = np.random.default_rng(sum(map(ord, key)))
    scores = rng.random((30, 3)) + 0.6 * np.eye(3)[LABELS]
    return scores / scores.sum(1, keepdims=True)


def result(key: str, accuracy: float | None, loss: float = 1.0, **changes) -> dict:
    test = evaluate_scores(LABELS, answers(key), ("accuracy", "auc"))
    values = {
        "key": key, "encoder": "e", "adapter": "linear", "amount": "4 shots", "shots": 4,
        "share": 1.0, "lr": 0.1, "seed": 0, "num_images": 12, "num_trained": 9, "test": test,
        "val": {"accuracy": accuracy, "loss": loss},
    }  # fmt: skip
    return values | changes


def test_the_best_is_by_validation_accuracy_then_loss() -> None:
    results = [result("a", 0.7, 0.1), result("b", 0.9, 0.6), result("c", 0.9, 0.5)]
    assert best_trial(results)["key"] == "c"
    assert best_trial([*results, result("d", None)])["key"] == "c"


def test_the_learning_rate_is_chosen_over_the_seeds_of_each_setting() -> None:
    results = [
        result("a", 0.9, lr=0.1, seed=1), result("b", 0.5, lr=0.1, seed=0),
        result("c", 0.8, lr=0.2, seed=0), result("d", 0.8, lr=0.2, seed=1),
        result("e", 0.99, lr=0.3, seed=0),  # its other seed has failed
        result("f", 0.1, amount="8 shots"),
    ]  # fmt: skip
    chosen = chosen_results(results)
    assert [r["key"] for r in chosen["e", "linear", "4 shots"]] == ["c", "d"]
    assert [r["key"] for r in chosen["e", "linear", "8 shots"]] == ["f"]


def test_the_table_has_means_and_both_intervals() -> None:
    results = [result("c", 0.8, seed=0), result("d", 0.7, seed=1)]
    [row] = result_table(results, LABELS, GROUPS, answers, metrics=("accuracy", "auc"), n=200)
    values = [r["test"]["accuracy"] for r in results]
    mean, low, high, _ = mean_interval(values)
    assert (row["accuracy"], row["seeds"], row["val_accuracy"]) == (mean, 2, pytest.approx(0.75))
    assert (row["accuracy_seed_low"], row["accuracy_seed_high"]) == (low, high)
    assert row["auc_low"] < row["auc"] < row["auc_high"]
    assert (row["encoder"], row["amount"], row["images"]) == ("e", "4 shots", 12)


def test_with_one_seed_the_interval_is_the_bootstrap_of_that_seed() -> None:
    [row] = result_table([result("c", 0.8)], LABELS, GROUPS, answers, metrics=("auc",), n=300)
    expected = bootstrap_ci(LABELS, answers("c"), GROUPS, "auc", n=300, seed=0)
    assert (row["auc_low"], row["auc_high"]) == pytest.approx((expected.low, expected.high))
    assert np.isnan(row["auc_seed_low"])
