"""Sections of the page of `finetune`, made from what the job wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cytoray.evaluation import Split, confusion_matrix, per_class_metrics
from cytoray.finetune.data import CellData
from cytoray.report.evaluation_figures import (
    Point,
    confusion_figure,
    few_shot_figure,
    picture_grid,
)
from cytoray.report.evaluation_page import (
    CONFUSION_CAPTION,
    HEADINGS,
    class_rows,
    interval_text,
    short_name,
)

SHOWN_MISTAKES = 12


def finetune_sections(out: Path, data: CellData, split: Split) -> list[dict[str, Any]]:
    """The sections of a finished `finetune` run.

    Args:
        out: the run folder, with `results.json` and `predictions.csv`.
        data: the images.
        split: their parts.
    """
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    answers = _answers(out, summary["classes"])
    table = results["table"]
    sections = [
        _data_section(summary, data),
        {
            "title": "How much data each way needs",
            "text": "Mean over the seeds at the learning rate that was best on validation; bands "
            "are 95 % intervals over resampled groups of the test part.",
            "figures": [{"image": _curves(table, len(summary["classes"])), "wide": True}],
            "tables": _tables(table),
        },
    ]
    if summary["failed"]:
        sections.append(
            {
                "title": "Failed trials",
                "text": [f"{key}: {why}" for key, why in summary["failed"].items()],
            }
        )
    best = next(trial for trial in results["trials"] if trial["key"] == summary["best"])
    facts = {
        "trial": summary["best"],
        "validation accuracy": summary["best_val_accuracy"],
        **{f"test {name}": value for name, value in best["test"].items()},
        "adapter": summary["adapter"],
        "merged encoder": summary["encoder"],
        "registered as": summary["registered_model"],
    }
    side = min(data.pixels, key=lambda side: abs(side - 160))
    images: Any = data.images(side)
    shown = [(split.test[i], title) for i, title in worst_mistakes(answers, summary["classes"])]
    sections.append(classifier_section("The best by validation", facts, answers, summary))
    sections.append(
        {
            "title": "Its surest mistakes",
            "text": "Test images that it calls wrongly with the highest probability.",
            "figures": [
                {
                    "image": picture_grid(
                        [images[np.array([row])][0] for row, _ in shown], [t for _, t in shown]
                    ),
                    "wide": True,
                }
            ],
        }
    )
    return sections


def _data_section(summary: Mapping[str, Any], data: CellData) -> dict[str, Any]:
    parts = summary["parts"]
    return {
        "title": "Images",
        "facts": {
            "images": len(data.cells),
            "groups": summary["num_groups"],
            "left out (quarantine)": summary["num_quarantined"],
            "grouping": summary["groups"],
        },
        "tables": [{"columns": list(parts[0]), "rows": parts}],
    }


def _curves(table: Sequence[Mapping[str, Any]], num_classes: int) -> bytes:
    series: dict[str, list[Point]] = {}
    for row in table:
        name = f"{short_name(row['encoder'])} {row['adapter']}"
        point = (row["images"], row["accuracy"], row["accuracy_low"], row["accuracy_high"])
        series.setdefault(name, []).append(point)
    return few_shot_figure(series, "test accuracy", chance=1.0 / num_classes)


def _tables(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was trained and its accuracy; then the other metrics."""
    who = [
        {"encoder": short_name(row["encoder"]), "adapter": row["adapter"], "amount": row["amount"]}
        for row in table
    ]
    main = [
        name
        | {
            "images": row["images"],
            "trained parameters": row["trained_parameters"],
            "lr": row["lr"],
            "seeds": row["seeds"],
            "val accuracy": row["val_accuracy"],
            "test accuracy": _spread(row, "accuracy"),
            "over seeds": seed_text(row),
        }
        for name, row in zip(who, table, strict=True)
    ]
    rest = [
        name | {HEADINGS[metric]: _spread(row, metric) for metric in HEADINGS}
        for name, row in zip(who, table, strict=True)
    ]
    captions = (
        "95 % CI over groups of the test part; last: 95 % t-interval of the mean over seeds.",
        "Test part, 95 % CI over groups.",
    )
    return [
        {"columns": list(rows[0]), "rows": rows, "caption": caption}
        for rows, caption in zip((main, rest), captions, strict=True)
    ]


def _spread(row: Mapping[str, Any], metric: str) -> str:
    value, low, high = (row[f"{metric}{end}"] for end in ("", "_low", "_high"))
    return interval_text(value, low, high)


def seed_text(row: Mapping[str, Any]) -> str:
    """`0.812 +- 0.014`; without an interval where there is one seed."""
    high = row["accuracy_seed_high"]
    spread = "" if high is None else f" \N{PLUS-MINUS SIGN} {high - row['accuracy']:.3f}"
    return f"{row['accuracy']:.3f}{spread}"


def _answers(out: Path, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """`labels` (M,), `probabilities` (M, C) and `names` (M,) of the predictions of a run."""
    frame = pd.read_csv(out / "predictions.csv", dtype={"label": str, "predicted": str})
    probabilities = frame[[f"p_{name}" for name in classes]].to_numpy(dtype=np.float64)
    return {
        "labels": np.array([list(classes).index(label) for label in frame["label"]]),
        "probabilities": probabilities / probabilities.sum(axis=1, keepdims=True),
        "names": frame["image"].to_numpy(dtype=str),
    }


def worst_mistakes(
    answers: Mapping[str, np.ndarray], classes: Sequence[str], count: int = SHOWN_MISTAKES
) -> list[tuple[int, str]]:
    """The surest wrong answers: place in the test part, and a title."""
    labels, probabilities = answers["labels"], answers["probabilities"]
    called = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(called != labels)
    order = wrong[np.argsort(-probabilities[wrong, called[wrong]], kind="stable")]
    return [
        (
            i,
            f"{classes[int(labels[i])]}\ncalled {classes[int(called[i])]}\n"
            f"probability {probabilities[i].max():.2f}",
        )
        for i in order[:count].tolist()
    ]


def classifier_section(
    title: str,
    facts: Mapping[str, Any],
    answers: Mapping[str, np.ndarray],
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """One classifier class by class: table and confusion matrix."""
    labels, probabilities = answers["labels"], answers["probabilities"]
    found = per_class_metrics(labels, probabilities, summary["classes"])
    rows = class_rows([vars(row) for row in found])
    return {
        "title": title,
        "facts": facts,
        "tables": [{"columns": list(rows[0]), "rows": rows}],
        "figures": [
            {
                "image": confusion_figure(
                    confusion_matrix(labels, probabilities), summary["classes"]
                ),
                "caption": CONFUSION_CAPTION,
            }
        ],
    }
