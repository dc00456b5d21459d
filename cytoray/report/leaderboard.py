"""The leaderboard of a search: one page that sorts, and the same as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cytoray.io import atomic_write_text
from cytoray.plain import json_ready
from cytoray.report.charts import curve_chart, reliability_chart
from cytoray.report.page import facts_of, render, text_of

_METRIC_NAMES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "brier": "Brier score",
    "ece": "expected calibration error",
}
_MAX_PER_CLASS = 6


def write_leaderboard(folder: str | Path, board: Mapping[str, Any]) -> Path:
    """Write `leaderboard.html`, `leaderboard.csv` and `leaderboard.json`.

    Args:
        folder: the run folder.
        board: `label`; `rows`, one a candidate, best first: `candidate`, `encoder`, the fields
            named in `settings`, `val_auc`, `val_auc_low`, `val_auc_high`, `val_accuracy`,
            `val_loss`, `best_epoch`, `folds`, `complete`, `stopped`, `seconds`, `chosen_in`;
            `best`, a candidate; `encoders`; `num_folds`; `cohort` facts; `unit`, what is
            resampled, in the plural; `left_out` ids by reason;
            `chosen` trial by fold; `tests`, by task what `assess` gives, and `calibration` before
            and after temperature scaling; `temperatures` by fold; `failed` messages by trial;
            `trial_seconds`.

    Returns:
        The page.
    """
    folder = Path(folder)
    plain = json_ready(board)
    atomic_write_text(folder / "leaderboard.json", json.dumps(plain, indent=1) + "\n")
    atomic_write_text(folder / "leaderboard.csv", _csv(plain["rows"]))
    html = render(
        "leaderboard.html",
        title=f"Leaderboard: {board['label']}",
        subtitle=str(folder),
        facts=facts_of(_facts(board)),
        table=_table(board),
        tests=[_test(task, test, board) for task, test in board["tests"].items()],
        chosen=_chosen(board),
        cohort=facts_of(board["cohort"]),
        left_out=[
            {"reason": reason, "slides": ", ".join(ids)}
            for reason, ids in board["left_out"].items()
        ],
        failed=list(board["failed"].items()),
    )
    path = folder / "leaderboard.html"
    atomic_write_text(path, html)
    return path


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _facts(board: Mapping[str, Any]) -> dict[str, Any]:
    best = board["rows"][0]
    facts: dict[str, Any] = {}
    for task, test in board["tests"].items():
        name = "held-out AUC" + (f", {task}" if len(board["tests"]) > 1 else "")
        facts[name] = _ranged(test["metrics"]["auc"])
    facts |= {
        "validation AUC of the best": f"{text_of(best['val_auc'])}{_bounds(best)}",
        "candidates": len(board["rows"]),
        "folds": board["num_folds"],
        "time of all trials": f"{board['trial_seconds']:,.0f} s",
    }
    return facts | ({"failed trials": len(board["failed"])} if board["failed"] else {})


def _bounds(row: Mapping[str, Any]) -> str:
    low, high = row["val_auc_low"], row["val_auc_high"]
    if low is None or low != low:
        return ""
    return f" ({low:.3f} to {high:.3f})"


def _ranged(entry: Mapping[str, Any], point: str = "point") -> str:
    if entry[point] is None or entry[point] != entry[point]:
        return "\N{EN DASH}"
    if entry["low"] is None or entry["low"] != entry["low"]:
        return f"{entry[point]:.3f}"
    return f"{entry[point]:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"


def _table(board: Mapping[str, Any]) -> dict[str, Any]:
    """The candidates: cells as text, and the value each sorts by."""
    several = board["num_folds"] > 1
    columns = [
        ("rank", "number"),
        *((name.replace("_", " "), "text") for name in board["settings"]),
    ]
    columns = [*columns, ("validation AUC", "number")]
    columns += [("95 % CI over folds", "number")] if several else []
    columns += [("accuracy", "number"), ("loss", "number"), ("best epoch", "number")]
    columns += [("folds won", "number")] if several else []
    columns += [("seconds", "number"), ("note", "text")]
    if len(board["encoders"]) > 1:
        columns.insert(1, ("encoder", "text"))
    rows = [_row(place, row, board, several) for place, row in enumerate(board["rows"], 1)]
    return {
        "columns": [{"name": name, "kind": kind} for name, kind in columns],
        "rows": rows,
    }


def _row(
    place: int, row: Mapping[str, Any], board: Mapping[str, Any], several: bool
) -> dict[str, Any]:
    values: list[Any] = [place]
    values += [row["encoder"]] if len(board["encoders"]) > 1 else []
    values += [row[name] for name in board["settings"]]
    values += [row["val_auc"]]
    cells = [_cell(value) for value in values]
    if several:
        cells.append(
            {"text": _bounds(row).strip(" ()") or "\N{EN DASH}", "value": row["val_auc_low"]}
        )
    cells += [_cell(row[name]) for name in ("val_accuracy", "val_loss", "best_epoch")]
    cells += [_cell(row["chosen_in"])] if several else []
    notes = [f"stopped early in {row['stopped']}"] if row["stopped"] else []
    lacking = row["folds"] < board["num_folds"]
    notes += [f"{row['folds']} of {board['num_folds']} folds"] if lacking else []
    cells += [_cell(round(row["seconds"], 1)), _cell("; ".join(notes))]
    return {"cells": cells, "best": row["candidate"] == board["best"], "name": row["candidate"]}


def _cell(value: Any) -> dict[str, Any]:
    text = text_of(value) if value != "" else ""
    number = isinstance(value, (int, float)) and value == value
    return {"text": text, "value": value if number else text}


def _test(task: str, test: Mapping[str, Any], board: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of one task's held-out answers."""
    over = test["over_folds"]
    metrics = [
        {
            "name": _METRIC_NAMES.get(name, name),
            "pooled": _ranged(entry),
            "folds": _ranged(over[name], "mean") if over else "",
        }
        for name, entry in test["metrics"].items()
    ]
    points = [
        {
            "what": f"{point['measure']} at {point['at']:.0%} {point['fixed']}".replace("%", " %"),
            "class": point["class"],
            "value": _ranged(point),
        }
        for point in test["operating_points"]
    ]
    shown = dict(list(test["curves"].items())[:_MAX_PER_CLASS])
    prevalence = {row["name"]: row["support"] / test["num"] for row in test["per_class"]}
    kind = {"before": "as trained", "after": "temperature scaled"}
    lines = {
        f"{kind[when]}: {name}": entry["reliability"][name]
        for name in list(shown)[:2]
        for when, entry in test["calibration"].items()
    }
    return {
        "task": task if len(board["tests"]) > 1 else "",
        "num": test["num"],
        "groups": f"{test['num_groups']} {board['unit']}",
        "unit": board["unit"].split(" ", 1)[0],
        "metrics": metrics,
        "over_folds": bool(over),
        "points": points,
        "many": len(test["classes"]) > 2,
        "roc": curve_chart(
            {name: (entry["fpr"], entry["tpr"]) for name, entry in shown.items()},
            title="ROC", x_label="1 - specificity", y_label="sensitivity", diagonal=True,
        ),
        "pr": curve_chart(
            {name: (entry["recall"], entry["precision"]) for name, entry in shown.items()},
            title="Precision and recall", x_label="recall", y_label="precision",
            levels={name: prevalence[name] for name in shown},
        ),
        "reliability": reliability_chart(lines),
        "calibration": [
            {
                "kind": kind[when],
                "reported": (when == "after") == test["scaled"],
                "ece": _ranged(entry["ece"]),
                "brier": _ranged(entry["brier"]),
            }
            for when, entry in test["calibration"].items()
        ],
        "confusion": _confusion(test),
        "per_class": [
            {name: text_of(value) for name, value in row.items()} for row in test["per_class"]
        ],
    }  # fmt: skip


def _confusion(test: Mapping[str, Any]) -> dict[str, Any]:
    """Counts with the share of their row, which shades the cell."""
    rows = []
    for name, counts in zip(test["classes"], test["confusion"], strict=True):
        total = max(sum(counts), 1)
        cells = [{"count": n, "share": n / total, "percent": f"{n / total:.0%}"} for n in counts]
        rows.append({"name": name, "cells": cells})
    return {"classes": test["classes"], "rows": rows}


def _chosen(board: Mapping[str, Any]) -> list[dict[str, str]]:
    """Which trial each fold's validation slides chose."""
    tasks = list(board["tests"])
    made = []
    for place, (fold, trial) in enumerate(board["chosen"].items()):
        aucs = []
        for task in tasks:
            test = board["tests"][task]
            over, pooled = test["over_folds"], test["metrics"]["auc"]["point"]
            aucs.append(text_of(over["auc"]["values"][place] if over else pooled))
        made.append(
            {
                "fold": fold or "held-out",
                "trial": trial,
                "auc": ", ".join(aucs),
                "temperature": ", ".join(f"{t:.2f}" for t in board["temperatures"][fold]),
            }
        )
    return made
