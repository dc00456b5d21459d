"""Sections of the run reports, made from what the jobs wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.nuclei import read_nuclei
from cytoray.report.figures import roc_figure
from cytoray.report.overlays import (
    attention_map,
    nuclei_overlay,
)
from cytoray.report.page import trial_table
from cytoray.slides import parse_tile_id
from cytoray.streaming.chunk_nuclei import to_tile_frame
from cytoray.streaming.plan import ReadPlan
from cytoray.streaming.tile_pixels import OpenSlides

_THUMBNAIL_PX = 1024


def index_section(plan: ReadPlan, index: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Key numbers of an index, and the detected nuclei on one chunk."""
    figures = []
    slides = OpenSlides(plan)
    slide = int(plan.slide_of(np.array([plan.num_chunks // 2]))[0])
    row = slides.row(slide)
    _, layout = slides.layout(slide)
    chunk = slides.read(slide, layout.chunk_at(int(plan.chunk_index[plan.num_chunks // 2])))
    nuclei = read_nuclei(index / "nuclei" / f"{row['slide_id']}.parquet")
    xy = to_tile_frame(
        nuclei,
        mpp=plan.mpp,
        mpp_slide=(row["mpp_x"], row["mpp_y"]),
        tile_x_px=chunk.origin_x_px,
        tile_y_px=chunk.origin_y_px,
    )
    side = min(768, *chunk.pixels.shape[:2])
    inside = np.all((xy >= 0) & (xy < side), axis=1)
    shown = np.concatenate([xy, nuclei[:, 2:]], axis=1)[inside]
    figures.append(
        {
            "image": nuclei_overlay(chunk.pixels[:side, :side], shown, plan.mpp),
            "caption": f"Nuclei found on a part of {row['slide_id']}.",
        }
    )
    facts = {
        "usable slides": summary["num_slides"],
        "quarantined slides": summary["num_quarantined"],
        "tiles kept": summary["num_tiles"],
        "nuclei": summary["num_nuclei"],
        "tile": f"{plan.tile_px} px at {plan.mpp:g} um/px",
        "quality page": summary["qc_page"],
    }
    return {"title": "Slides and nuclei", "facts": facts, "figures": figures}


def tune_sections(
    results: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    held_out: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The trial table with its failures, and the held-out result with its ROC.

    Args:
        results: of the finished trials.
        summary: of the run.
        held_out: `labels` int (N,), `scores` float (N,), `groups` (N,), `unit` (what
            the groups are, in the plural), `classes`.
    """
    low, high = summary["auc_ci"]
    unit = str(held_out["unit"]).split(" ", 1)[0]
    rows = [
        {
            "trial_id": result["key"],
            **{name.replace("lora_", "LoRA "): result["config"][name] for name in result["config"]},
            "val AUC": result["val"].get("auc"),
            "val accuracy": result["val"].get("accuracy"),
            "best epoch": result["best_epoch"],
            "seconds": result["seconds"],
        }
        for result in results
    ]
    trials: dict[str, Any] = {
        "title": "Trials",
        "facts": summary["cohort"],
        "tables": [trial_table(rows, best=summary["best"], caption="Chosen by validation AUC.")],
    }
    failures = [f"{key} failed: {text}" for key, text in summary["failed"].items()]
    if notes := [*summary.get("frozen_blocks", []), *failures]:
        trials["text"] = notes
    figures = []
    if len(held_out["classes"]) == 2:
        figures.append(
            {
                "image": roc_figure(
                    held_out["labels"],
                    held_out["scores"],
                    (low, high),
                    held_out["groups"],
                    unit=unit,
                    positive_name=str(held_out["classes"][1]),
                ),
                "caption": f"ROC on the held-out slides, band by resampled {unit}.",
            }
        )
    result = {
        "title": "Held-out slides",
        "facts": {
            "AUC": summary["auc_heldout"],
            f"95 % CI ({unit} resampled)": f"{low:.3f} to {high:.3f}",
            "slides": summary["num_heldout"],
            "head": summary["head"],
            "registered as": summary["registered_model"],
        },
        "figures": figures,
    }
    return [trials, result]


def attention_section(
    plan: ReadPlan, rows: Sequence[Mapping[str, Any]], positive: str
) -> dict[str, Any] | None:
    """Attention of the chosen head over the positive held-out slide it is surest of.

    Args:
        plan: the slides.
        rows: held-out slides with `slide_id`, `label`, `probabilities`, `attention`, `tile_ids`.
        positive: the class to look for.
    """
    candidates = [row for row in rows if row["label"] == positive]
    if not candidates:
        return None
    chosen = max(candidates, key=lambda row: row["probabilities"][positive] or 0.0)
    slides = OpenSlides(plan)
    slide = plan.slides.column("slide_id").to_pylist().index(chosen["slide_id"])
    info = slides.row(slide)
    _, layout = slides.layout(slide)
    attention = np.array(chosen["attention"])
    corners = np.array(
        [layout.tile_origin_level0(*parse_tile_id(name)[2:]) for name in chosen["tile_ids"]]
    )
    top = np.argsort(-attention)[:6]
    picture = attention_map(
        slides.thumbnail(slide, _THUMBNAIL_PX),
        corners,
        attention,
        plan.tile_px * plan.mpp / info["mpp_x"],
        (info["width_px_level0"], info["height_px_level0"]),
        [slides.read_tile(slide, chosen["tile_ids"][i]) for i in top],
        top.tolist(),
    )
    probability = chosen["probabilities"][positive]
    return {
        "title": "Attention",
        "figures": [
            {
                "image": picture,
                "caption": f"{chosen['slide_id']} (label {positive}, probability "
                f"{probability:.2f}): where the head looks, and its most attended tiles.",
                "wide": True,
            }
        ],
    }
