"""Sections of the pages of `finetune` and `evaluate`, made from what the jobs wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cytoray.evaluation import Split, confusion_matrix, per_class_metrics
from cytoray.evaluation.protocol import Examples, map_places
from cytoray.finetune.data import CellData
from cytoray.report.evaluation_figures import (
    Point,
    attention_figure,
    confusion_figure,
    embedding_figure,
    few_shot_figure,
    interval_figure,
    picture_grid,
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
            "tables": [_table(table)],
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
        name = f"{_short(row['encoder'])} {row['adapter']}"
        point = (row["images"], row["accuracy"], row["accuracy_low"], row["accuracy_high"])
        series.setdefault(name, []).append(point)
    return few_shot_figure(series, "test accuracy", chance=1.0 / num_classes)


def _table(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def spread(row: Mapping[str, Any], metric: str) -> str:
        value, low, high = (row[f"{metric}{end}"] for end in ("", "_low", "_high"))
        return interval_text(value, low, high)

    rows = [
        {
            "encoder": _short(row["encoder"]),
            "adapter": row["adapter"],
            "amount": row["amount"],
            "images": row["images"],
            "lr": row["lr"],
            "seeds": row["seeds"],
            "trained parameters": row["trained_parameters"],
            "val accuracy": row["val_accuracy"],
            **{m: spread(row, m) for m in ("accuracy", "balanced_accuracy", "macro_f1", "auc")},
            "accuracy over seeds": seed_text(row),
        }
        for row in table
    ]
    caption = "Test part: 95 % CI over groups; last column: 95 % t-interval of the mean over seeds."
    return {"columns": list(rows[0]), "rows": rows, "caption": caption}


def seed_text(row: Mapping[str, Any]) -> str:
    """`0.812 +- 0.014`; without an interval where there is one seed."""
    high = row["accuracy_seed_high"]
    spread = "" if high is None else f" \N{PLUS-MINUS SIGN} {high - row['accuracy']:.3f}"
    return f"{row['accuracy']:.3f}{spread}"


def interval_text(value: float | None, low: float | None, high: float | None) -> str:
    """`0.812 (0.790 to 0.833)`."""
    if value is None:
        return "undefined"
    bounds = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    return f"{value:.3f}{bounds}"


def _short(encoder: str) -> str:
    """The end of a long path or name."""
    return encoder if len(encoder) <= 40 else f"...{encoder[-37:]}"


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
    rows = [vars(row) for row in per_class_metrics(labels, probabilities, summary["classes"])]
    return {
        "title": title,
        "facts": facts,
        "tables": [{"columns": list(rows[0]), "rows": rows}],
        "figures": [
            {
                "image": confusion_figure(
                    confusion_matrix(labels, probabilities), summary["classes"]
                ),
                "caption": "Test images: true class by row, called class by column.",
            }
        ],
    }


def evaluate_sections(out: Path, examples: Examples, cells: Any = None) -> list[dict[str, Any]]:
    """The sections of a finished `evaluate` run.

    Args:
        out: the run folder, with `results.json` and the pieces.
        examples: labels, groups and parts.
        cells: settings that hold the images; None for bags.
    """
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    metric = results["metric"]
    rows = [
        (f"{_short(row['encoder'])}  {row['probe']}", row["accuracy"], row["accuracy_low"],
         row["accuracy_high"])
        for row in results["table"]
    ]  # fmt: skip
    sections = [
        {
            "title": "Examples",
            "facts": {
                "examples": summary["num_examples"],
                "groups": summary["num_groups"],
                "left out (quarantine)": summary["num_left_out"],
            },
            "tables": [{"columns": list(summary["parts"][0]), "rows": summary["parts"]}],
        },
        {
            "title": "Probes",
            "text": "Test part; 95 % intervals over resampled groups.",
            "figures": [{"image": interval_figure(rows, "test accuracy"), "wide": True}],
            "tables": [_probe_table(results["table"])],
        },
    ]
    if results["comparisons"]:
        sections.append(_comparison_section(results["comparisons"], metric))
    sections.append(_few_shot_section(results["few_shot"], metric, len(summary["classes"])))
    sections.append(_map_section(out, results, examples))
    if cells is not None:
        sections += _attention_section(out, results, examples, cells)
    best = max(results["probes"], key=lambda probe: probe["metrics"]["accuracy"][0])
    sections += [_probe_section(probe, summary["classes"], probe is best)
                 for probe in sorted(results["probes"], key=lambda p: p is not best)]  # fmt: skip
    return sections


def _probe_table(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("accuracy", "balanced_accuracy", "macro_f1", "auc")
    rows = [
        {
            "encoder": _short(row["encoder"]),
            "probe": row["probe"],
            **{m: interval_text(row[m], row[f"{m}_low"], row[f"{m}_high"]) for m in names},
        }
        for row in table
    ]
    return {"columns": list(rows[0]), "rows": rows}


def _comparison_section(comparisons: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    rows = [
        {
            "probe": c["probe"],
            "first": _short(c["first"]),
            "second": _short(c["second"]),
            "difference": interval_text(c["difference"], c["low"], c["high"]),
            "p": c["p_value"],
            "p (Holm)": c["p_adjusted"],
        }
        for c in comparisons
    ]
    return {
        "title": "One encoder against another",
        "text": f"Difference in {metric}, first minus second, under the same resampled groups; "
        "Holm's correction holds over all rows.",
        "tables": [{"columns": list(rows[0]), "rows": rows}],
    }


def _few_shot_section(
    points: Sequence[Mapping[str, Any]], metric: str, num_classes: int
) -> dict[str, Any]:
    series: dict[str, list[Point]] = {}
    mine = [point for point in points if point["metric"] == metric]
    for point in mine:
        bounds = [np.nan if point[end] is None else point[end] for end in ("low", "high")]
        name = f"{_short(point['encoder'])} {point['probe']}"
        series.setdefault(name, []).append(
            (point["shots"] * num_classes, point["mean"], bounds[0], bounds[1])
        )
    rows = [
        {
            "encoder": _short(point["encoder"]),
            "probe": point["probe"],
            "shots": point["shots"],
            metric: interval_text(point["mean"], point["low"], point["high"]),
            "seeds": point["num_seeds"],
        }
        for point in mine
    ]
    chance = 1.0 / num_classes if "accuracy" in metric else None
    section: dict[str, Any] = {
        "title": "Few-shot curves",
        "text": "Mean and 95 % t-interval over the draws; the test part is the same throughout.",
        "figures": [{"image": few_shot_figure(series, f"test {metric}", chance), "wide": True}],
    }
    if rows:
        section["tables"] = [{"columns": list(rows[0]), "rows": rows}]
    return section


def _map_section(out: Path, results: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
    maps = {}
    for key, place in results["pieces"].items():
        path = out / place / "map.npy"
        if key.startswith("map ") and path.is_file():
            maps[_short(key.split(" ", 1)[1].rsplit(" ", 1)[0])] = np.load(path)
    seed = json.loads((out / "summary.json").read_text(encoding="utf-8"))["split_seed"]
    labels = examples.labels[map_places(examples.split, seed)]
    return {
        "title": "Features in two dimensions",
        "text": "Test part; distances between far groups mean little in t-SNE.",
        "figures": [{"image": embedding_figure(maps, labels, examples.classes), "wide": True}],
    }


def _attention_section(
    out: Path, results: Mapping[str, Any], examples: Examples, cells: Any
) -> list[dict[str, Any]]:
    maps = {}
    for key, place in results["pieces"].items():
        path = out / place / "attention.npy"
        if key.startswith("attention ") and path.is_file():
            maps[key.split(" ", 1)[1].rsplit(" ", 1)[0]] = np.load(path)
    if not maps:
        return []
    places = json.loads((out / "summary.json").read_text(encoding="utf-8"))["attention_of"]
    side = min(cells.data.pixels, key=lambda side: abs(side - 224))
    images = list(cells.data.images(side)[np.array(places)])
    titles = [examples.classes[examples.labels[place]] for place in places]
    return [
        {
            "title": "Attention",
            "text": "Attention of the class token in the last block, mean over its heads.",
            "figures": [{"image": attention_figure(images, maps, titles), "wide": True}],
        }
    ]


def _probe_section(
    probe: Mapping[str, Any], classes: Sequence[str], is_best: bool
) -> dict[str, Any]:
    rows = probe["per_class"]
    title = f"{_short(probe['encoder'])}, {probe['probe']}" + (" (best)" if is_best else "")
    return {
        "title": title,
        "facts": {f"chosen {name}": value for name, value in probe["chosen"].items()},
        "tables": [{"columns": list(rows[0]), "rows": rows}],
        "figures": [{"image": confusion_figure(np.array(probe["confusion"]), classes)}],
    }
