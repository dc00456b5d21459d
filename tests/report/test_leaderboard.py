from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from cytoray.evaluation.held_out import assess
from cytoray.report.leaderboard import write_leaderboard


def made_test(classes: int, folds: bool) -> dict:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % classes
    logits = rng.normal(size=(60, classes)) + np.eye(classes)[labels]
    table = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    names = ["<NILM>", "LSIL", "HSIL"][:classes]
    groups = np.arange(60) // 3
    names_of_folds = np.repeat(["fold0", "fold1"], 30) if folds else None
    found = assess(labels, table, groups, names, folds=names_of_folds, n=50)
    kinds = {"ece": found["metrics"]["ece"], "brier": found["metrics"]["brier"],
             "reliability": found["reliability"]}  # fmt: skip
    return found | {"calibration": {"before": kinds, "after": kinds}, "scaled": False}


def board(classes: int, folds: bool) -> dict:
    nan = float("nan")
    rows = [
        {"candidate": f"c{i}", "encoder": "ours", "aggregator": "abmil", "lora_rank": 0,
         "lr": 10.0**-i, "val_auc": 0.9 - i / 10, "val_auc_low": 0.5 if folds else nan,
         "val_auc_high": 0.95 if folds else nan, "val_accuracy": 0.8, "val_loss": 0.3,
         "folds": 2 if folds else 1, "complete": i < 2, "stopped": int(i == 2), "best_epoch": 3.0,
         "seconds": 12.25, "chosen_in": int(i == 0)}
        for i in range(3)
    ]  # fmt: skip
    names = ["fold0", "fold1"] if folds else [""]
    return {
        "label": "diagnosis", "rows": rows, "best": "c0", "encoders": ["ours"],
        "settings": ["aggregator", "lora_rank", "lr"], "num_folds": len(names),
        "cohort": {"slides": 60},
        "unit": "groups (same patient or image)" if folds else "patients",
        "left_out": {"no label": ["s1", "s2"]},
        "chosen": dict.fromkeys(names, "c0"), "tests": {"diagnosis": made_test(classes, folds)},
        "temperatures": {name: [1.25] for name in names},
        "failed": {"c3": "no <slide>"}, "trial_seconds": 40.0,
    }  # fmt: skip


@pytest.mark.parametrize(("classes", "folds"), [(2, False), (3, True)])
def test_the_page_holds_everything_and_fetches_nothing(tmp_path, classes, folds) -> None:
    given = board(classes, folds)
    html = write_leaderboard(tmp_path, given).read_text()
    auc = given["tests"]["diagnosis"]["metrics"]["auc"]["point"]
    assert f"{auc:.3f} (" in html
    for text in ("sensitivity at 90 % specificity", "specificity at 95 % sensitivity",
                 "expected calibration error", "Confusion", "stopped early in 1", "1.25",
                 "no &lt;slide&gt;", "s1, s2"):  # fmt: skip
        assert text in html
    assert html.count("<svg") == 3
    assert ("mean over folds" in html) == folds
    unit = "groups (same patient or image), each" if folds else "patients, each"
    assert f"60 slides of 20 {unit}" in html
    assert f"95 %, {unit.split(' ', 1)[0].rstrip(',')} resampled" in html
    if classes == 3:
        assert "&lt;NILM&gt;" in html
    assert "<NILM>" not in html
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", html)
    assert "prefers-color-scheme: dark" in html
    numbers = re.findall(r"""data-value="([^"]*)">0\.[789]""", html)
    assert [float(n) for n in numbers[:1]] == [0.9]


def test_the_files_say_the_same(tmp_path) -> None:
    given = board(2, True)
    write_leaderboard(tmp_path, given)
    rows = list(csv.DictReader((tmp_path / "leaderboard.csv").open()))
    assert [row["candidate"] for row in rows] == ["c0", "c1", "c2"]
    assert float(rows[1]["val_auc"]) == pytest.approx(0.8)
    plain = json.loads((tmp_path / "leaderboard.json").read_text())
    assert plain["best"] == "c0"
    assert plain["tests"]["diagnosis"]["confusion"] == given["tests"]["diagnosis"]["confusion"]
