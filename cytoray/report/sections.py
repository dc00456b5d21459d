"""Sections of the run reports, made from what the jobs wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytoray.nuclei import read_nuclei
from cytoray.perturb import CropPolicy, nuclei_centred_views, tile_rng
from cytoray.report.figures import loss_curves, roc_figure
from cytoray.report.overlays import (
    attention_map,
    crop_outlines,
    nuclei_overlay,
    view_grid,
    views_to_uint8,
)
from cytoray.report.page import trial_table
from cytoray.slides import mask_indices, parse_tile_id
from cytoray.ssl.augment import render_views
from cytoray.streaming.chunk_nuclei import to_tile_frame
from cytoray.streaming.plan import ReadPlan
from cytoray.streaming.tile_pixels import OpenSlides

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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


def pretrain_section(
    events: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], views: bytes | None
) -> dict[str, Any]:
    """Losses over the steps, and what the model was shown."""
    figures: list[dict[str, Any]] = []
    if any(event.get("event") == "step" for event in events):
        figures.append(
            {
                "image": loss_curves(events, event="step"),
                "caption": "Training losses by part.",
                "wide": True,
            }
        )
    if views:
        figures.append(
            {
                "image": views,
                "caption": "Nuclei-Centred Perturbation: original tile with its nuclei (those "
                "retained in blue), perturbed tile with its crops, the crops as the model sees "
                "them.",
                "wide": True,
            }
        )
    names = ("steps", "loss", "tiles_per_s", "wait_share", "num_quarantined_tiles", "seconds")
    facts = {name.replace("_", " "): summary.get(name) for name in names}
    return {"title": "Pretraining", "facts": facts, "figures": figures}


def example_views(
    plan: ReadPlan,
    index: Path,
    policy: CropPolicy,
    *,
    radius_um: float,
    retain_fraction: tuple[float, float],
    global_px: int,
    local_px: int,
    seed: int,
    num_tiles: int = 4,
) -> bytes:
    """A picture of some tiles, perturbed and cropped just as pretraining does it."""
    rng = np.random.default_rng(seed)
    slides = OpenSlides(plan)
    rows: list[dict[str, Any]] = []
    for number in rng.permutation(plan.num_chunks):
        found = _example(plan, index, slides, int(number), policy, radius_um, retain_fraction, seed)
        if found is not None:
            rows.append(_rendered(*found, policy, global_px, local_px, radius_um, plan.mpp))
        if len(rows) == num_tiles:
            break
    return view_grid(rows)


def _example(
    plan: ReadPlan,
    index: Path,
    slides: OpenSlides,
    number: int,
    policy: CropPolicy,
    radius_um: float,
    retain_fraction: tuple[float, float],
    seed: int,
) -> tuple[np.ndarray, np.ndarray, Any] | None:
    """The tile of a chunk with the most nuclei: pixels, nuclei, and what becomes of them."""
    slide = int(plan.slide_of(np.array([number]))[0])
    row = slides.row(slide)
    _, layout = slides.layout(slide)
    place = layout.chunk_at(int(plan.chunk_index[number]))
    chunk = slides.read(slide, place)
    nuclei = read_nuclei(index / "nuclei" / f"{row['slide_id']}.parquet")
    best: tuple[int, np.ndarray] | None = None
    for tile in mask_indices(int(plan.keep_mask[number])).tolist():
        x, y, _, _ = layout.tile_rect_px(*place, tile)
        xy = to_tile_frame(
            nuclei,
            mpp=plan.mpp,
            mpp_slide=(row["mpp_x"], row["mpp_y"]),
            tile_x_px=x,
            tile_y_px=y,
        )
        xy = xy[np.all((xy >= 0) & (xy < plan.tile_px), axis=1)]
        if tile not in chunk.bad_tiles and len(xy) > (len(best[1]) if best else 0):
            best = (tile, xy)
    if best is None:
        return None
    tile, xy = best
    rng = tile_rng(seed, 0, f"{row['slide_id']}:{number}:{tile}")
    made = nuclei_centred_views(
        chunk.tile(tile), xy, radius_um / plan.mpp, policy, rng, retain_fraction=retain_fraction
    )
    return chunk.tile(tile), xy, made


def _rendered(
    original: np.ndarray,
    xy: np.ndarray,
    made: Any,
    policy: CropPolicy,
    global_px: int,
    local_px: int,
    radius_um: float,
    mpp: float,
) -> dict[str, Any]:
    tiles = torch.from_numpy(made.tile.copy())[None]
    params = torch.from_numpy(made.views)[None]
    big = render_views(tiles, params[:, : policy.num_global], global_px, _MEAN, _STD)[0]
    small = []
    if policy.num_local:
        local = render_views(tiles, params[:, policy.num_global :], local_px, _MEAN, _STD)[0]
        small = views_to_uint8(local.numpy(), _MEAN, _STD)
    return {
        "original": original,
        "perturbed": made.tile,
        "nuclei_xy_px": xy,
        "retained": made.retained,
        "radius_px": np.full(len(xy), radius_um / mpp),
        "global_views": views_to_uint8(big.numpy(), _MEAN, _STD),
        "local_views": small,
        "outlines": crop_outlines(made.views),
    }


def tune_sections(
    results: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    held_out: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The trial table with its failures, and the held-out result with its ROC.

    Args:
        results: of the finished trials.
        summary: of the run.
        held_out: `labels` int (N,), `scores` float (N,), `patients` (N,), `classes`.
    """
    low, high = summary["auc_ci"]
    rows = [
        {
            "trial_id": result["key"],
            "aggregator": result["config"]["aggregator"],
            "LoRA rank": result["config"]["lora_rank"],
            "lr": result["config"]["lr"],
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
    if summary["failed"]:
        trials["text"] = [f"{key} failed: {text}" for key, text in summary["failed"].items()]
    figures = []
    if len(held_out["classes"]) == 2:
        figures.append(
            {
                "image": roc_figure(
                    held_out["labels"],
                    held_out["scores"],
                    (low, high),
                    held_out["patients"],
                    positive_name=str(held_out["classes"][1]),
                ),
                "caption": "ROC on the held-out slides, band by patient bootstrap.",
            }
        )
    result = {
        "title": "Held-out slides",
        "facts": {
            "AUC": summary["auc_heldout"],
            "95 % CI (patients resampled)": f"{low:.3f} to {high:.3f}",
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
