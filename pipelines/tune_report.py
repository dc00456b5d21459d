"""The pages of a finished search, from the files it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.errors import SlideError
from cytoray.report.sections import attention_section, tune_sections
from cytoray.streaming.plan import ReadPlan


def report_sections(out: Path, plan: ReadPlan) -> list[dict[str, Any]]:
    """The report's sections of a finished run, from its files alone."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    board = json.loads((out / "leaderboard.json").read_text(encoding="utf-8"))
    rows = json.loads((out / "heldout.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["label"] is not None]
    results = [
        {
            "key": row["candidate"],
            "config": {name: row[name] for name in ("aggregator", "lora_rank", "lr")},
            "val": {"auc": row["val_auc"], "accuracy": row["val_accuracy"]},
            "best_epoch": row["best_epoch"],
            "seconds": row["seconds"],
        }
        for row in board["rows"]
    ]
    classes = summary["classes"]
    held_out = {
        "labels": np.array([classes.index(row["label"]) for row in rows]),
        "scores": np.array([row["probabilities"][classes[-1]] for row in rows]),
        "patients": np.array([row["patient_id"] for row in rows]),
        "classes": classes,
    }
    sections = tune_sections(results, summary, held_out)
    try:
        attention = attention_section(plan, rows, classes[-1])
    except (SlideError, OSError) as error:
        attention = {"title": "Attention", "text": f"No picture: {error}"}
    return sections + ([attention] if attention else [])
