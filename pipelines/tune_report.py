"""The files and pages of a finished search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cytoray.distributed.chosen import answer_rows
from cytoray.errors import SlideError
from cytoray.io import atomic_write_text
from cytoray.mil.space import changed_fields, flat_config
from cytoray.plain import json_ready
from cytoray.report.leaderboard import write_leaderboard
from cytoray.report.sections import attention_section, tune_sections
from cytoray.runs import RunFolder
from cytoray.streaming.plan import ReadPlan

if TYPE_CHECKING:
    from pipelines.tune import Config
    from pipelines.tune_outcome import Outcome
    from pipelines.tune_search import Search


def report_sections(out: Path, plan: ReadPlan) -> list[dict[str, Any]]:
    """The report's sections of a finished run, from its files alone."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    board = json.loads((out / "leaderboard.json").read_text(encoding="utf-8"))
    rows = json.loads((out / "heldout.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["label"] is not None]
    results = [
        {
            "key": row["candidate"],
            "config": {name: row[name] for name in board["settings"]},
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
        "groups": np.array([row["group"] for row in rows]),
        "unit": summary["unit"],
        "classes": classes,
    }
    sections = tune_sections(results, summary, held_out)
    try:
        attention = attention_section(plan, rows, classes[-1])
    except (SlideError, OSError) as error:
        attention = {"title": "Attention", "text": f"No picture: {error}"}
    return sections + ([attention] if attention else [])


def write_results(
    config: Config,
    folder: RunFolder,
    search: Search,
    outcome: Outcome,
    summary: dict[str, Any],
    results: list[dict[str, Any]],
) -> None:
    """Write `heldout.json`, `leaderboard.html`, `.csv` and `.json` of a finished search."""
    rows = answer_rows(outcome.answers, search.cohort, calibrate=config.calibrate)
    atomic_write_text(folder.path / "heldout.json", json.dumps(json_ready(rows)) + "\n")
    by_key = {candidate.key: candidate for candidate in search.candidates}
    changed = changed_fields([candidate.config for candidate in search.candidates])
    shown = list(dict.fromkeys(["aggregator", "lora_rank", "lr", *changed]))
    chosen = [result["candidate"] for result in outcome.best.values()]
    table = []
    for row in outcome.rows:
        candidate = by_key[row["candidate"]]
        flat = flat_config(candidate.config)
        table.append(
            {"candidate": row["candidate"], "encoder": search.features[candidate.encoder].name}
            | {name: flat.get(name) for name in shown}
            | {name: value for name, value in row.items() if name != "candidate"}
            | {"chosen_in": chosen.count(row["candidate"])}
        )
    write_leaderboard(
        folder.path,
        {
            "label": ", ".join(config.label),
            "best": outcome.chosen.key,
            "encoders": [entry.name for entry in search.features],
            "settings": shown,
            "cohort": summary["cohort"],
            "unit": summary["unit"],
            "left_out": search.cohort.left_out,
            "rows": table,
            "chosen": summary["chosen"],
            "tests": outcome.tests,
            "temperatures": summary["temperatures"],
            "failed": summary["failed"],
            "num_folds": len(outcome.best),
            "trial_seconds": sum(result["seconds"] for result in results),
        },
    )
