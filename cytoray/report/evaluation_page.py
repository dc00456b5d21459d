"""Sections of the page of `evaluate`, made from what the job wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.evaluation.protocol import Examples, map_places
from cytoray.report.evaluation_figures import (
    Point,
    attention_figure,
    confusion_figure,
    embedding_figure,
    few_shot_figure,
    interval_figure,
)

CONFUSION_CAPTION = "Test examples: true class by row, called class by column."
CLASS_HEADINGS = {"support": "test examples", "f1": "F1", "auc": "AUC"}
HEADINGS = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "auc": "AUC"}


def interval_text(value: float | None, low: float | None, high: float | None) -> str:
    """`0.812 (0.790 to 0.833)`."""
    if value is None:
        return "undefined"
    bounds = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    return f"{value:.3f}{bounds}"


def short_name(encoder: str) -> str:
    """The end of a long path or name."""
    return encoder if len(encoder) <= 40 else f"...{encoder[-37:]}"


def class_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `per_class_metrics` under the headings of a page."""
    return [
        {"class": row["name"]}
        | {CLASS_HEADINGS.get(k, k): v for k, v in row.items() if k != "name"}
        for row in rows
    ]


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
        (f"{short_name(row['encoder'])}  {row['probe']}", row["accuracy"], row["accuracy_low"],
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
                "rows without a label": summary["num_unlabelled"],
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
            "encoder": short_name(row["encoder"]),
            "probe": row["probe"],
            **{
                HEADINGS.get(m, m): interval_text(row[m], row[f"{m}_low"], row[f"{m}_high"])
                for m in names
            },
        }
        for row in table
    ]
    return {"columns": list(rows[0]), "rows": rows}


def _comparison_section(comparisons: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    rows = [
        {
            "probe": c["probe"],
            "first": short_name(c["first"]),
            "second": short_name(c["second"]),
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
        name = f"{short_name(point['encoder'])} {point['probe']}"
        series.setdefault(name, []).append(
            (point["shots"] * num_classes, point["mean"], bounds[0], bounds[1])
        )
    rows = [
        {
            "encoder": short_name(point["encoder"]),
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
            maps[short_name(key.split(" ", 1)[1].rsplit(" ", 1)[0])] = np.load(path)
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
    rows = class_rows(probe["per_class"])
    title = f"{short_name(probe['encoder'])}, {probe['probe']}" + (" (best)" if is_best else "")
    return {
        "title": title,
        "facts": {f"chosen {name}": value for name, value in probe["chosen"].items()},
        "tables": [{"columns": list(rows[0]), "rows": rows}],
        "figures": [
            {
                "image": confusion_figure(np.array(probe["confusion"]), classes),
                "caption": CONFUSION_CAPTION,
            }
        ],
    }
