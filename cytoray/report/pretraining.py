"""The report of a pretraining: losses, probes, what the model was shown and where it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytoray.models.attention_maps import attention_of_images
from cytoray.models.encoder import load_encoder
from cytoray.nuclei import build_detector, read_nuclei
from cytoray.perturb import CropPolicy, PerturbConfig, tile_rng
from cytoray.report.evaluation_figures import attention_figure
from cytoray.report.figures import loss_curves
from cytoray.report.overlays import crop_outlines, view_grid, views_to_uint8
from cytoray.slides import ChunkPixels, Grid, mask_indices
from cytoray.ssl.augment import render_views
from cytoray.streaming.chunk_nuclei import chunk_core_px, detect_in_chunk, to_tile_frame
from cytoray.streaming.plan import ReadPlan
from cytoray.streaming.tile_pixels import OpenSlides

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Chunks looked through for tiles with nuclei to show.
_CHUNKS_TRIED = 64
_FACTS = ("steps", "loss", "tiles_per_s", "wait_share", "mfu", "cache_hit_share",
          "num_quarantined_slides", "num_quarantined_tiles", "quarantine", "seconds")  # fmt: skip
_HEALTH = ("feature_std", "effective_rank", "teacher_entropy", "wait_share", "tiles_per_s", "ema")
_CAPTIONS = {
    "views": "Original tile with its nuclei, where they are known (those retained in blue); the "
    "tile that training gets, with its crops; the crops as the model sees them.",
    "attention": "Where the class token of the trained encoder looks (last block, mean over the "
    "heads).",
}


def pretrain_section(
    events: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    pictures: Mapping[str, bytes],
) -> dict[str, Any]:
    """Losses, health and probes over the steps, what the model was shown, and where it looks.

    Args:
        events: of the run.
        summary: of the run.
        pictures: PNG bytes by name, of `example_views` and `example_attention`.
    """
    figures: list[dict[str, Any]] = []
    kinds = {event.get("event") for event in events}
    if "step" in kinds:
        for names, caption in (
            (None, "Training losses by part."),
            (_HEALTH, "Spread and rank of the features, the teacher, and the stream."),
        ):
            image = loss_curves(events, names, event="step")
            figures.append({"image": image, "caption": caption, "wide": True})
    if "probe" in kinds:
        names = [f"probe_{probe}_{m}" for m in ("accuracy", "auc") for probe in ("knn", "linear")]
        image = loss_curves(events, names, event="probe")
        caption = "Probes of the frozen encoder on labelled cells, groups kept whole."
        figures.append({"image": image, "caption": caption, "wide": True})
    figures += [
        {"image": image, "caption": _CAPTIONS[name], "wide": True}
        for name, image in pictures.items()
    ]
    facts = {name.replace("_", " "): summary[name] for name in _FACTS if name in summary}
    return {"title": "Pretraining", "facts": facts, "figures": figures}


def example_views(
    plan: ReadPlan,
    nuclei_dir: Path | None,
    policy: CropPolicy,
    *,
    perturb: PerturbConfig,
    detector: str,
    global_px: int,
    local_px: int,
    seed: int,
    num_tiles: int = 4,
) -> bytes | None:
    """A picture of some tiles, perturbed and cropped just as pretraining does it.

    Nuclei are those of the index, in `nuclei_dir`, else what `detector` finds where the
    perturbation needs them.
    None where nuclei were looked for and no tile has one.
    """
    rows = []
    find = _nuclei_source(nuclei_dir, detector if perturb.enabled else "none")
    for number, place, tile, pixels, xy in _best_tiles(plan, find, seed, num_tiles):
        rng = tile_rng(seed, 0, f"{place}:{number}:{tile}")
        made = perturb.views(pixels, xy, policy, rng, mpp=plan.mpp)
        row = _rendered(pixels, xy, made, policy, global_px, local_px)
        if perturb.enabled and perturb.shuffle:
            row["radius_px"] = np.full(len(xy), perturb.radius_um / plan.mpp)
        rows.append(row)
    return view_grid(rows) if rows else None


@torch.inference_mode()
def example_attention(
    plan: ReadPlan, nuclei_dir: Path | None, encoder: Path, *, seed: int, num_tiles: int = 8
) -> bytes | None:
    """A picture of where the class token of an encoder looks in some tiles.

    None where no tile has a nucleus, if the index knows them, or the encoder has no attention.
    """
    found = _best_tiles(plan, _nuclei_source(nuclei_dir, "none"), seed, num_tiles)
    tiles = [pixels for *_, pixels, _ in found]
    model = load_encoder(encoder)
    if not tiles:
        return None
    images = torch.from_numpy(np.stack(tiles))
    maps = attention_of_images(model, images)
    if maps is None:
        return None
    return attention_figure(tiles, {"attention": maps.float().numpy()}, [""] * len(tiles))


# (slide's row, its chunk, um/px of the tiles) -> nuclei (N, 4) in level-0 px
_FindNuclei = Callable[[dict[str, Any], ChunkPixels, Grid], np.ndarray]


def _nuclei_source(nuclei_dir: Path | None, detector: str) -> _FindNuclei | None:
    """The index's nuclei, or a detector's; None where there is neither."""
    if nuclei_dir is not None:
        return lambda row, *_: read_nuclei(nuclei_dir / f"{row['slide_id']}.parquet")
    if detector == "none":
        return None
    detect = build_detector(detector)
    return lambda row, chunk, grid: detect_in_chunk(
        detect,
        chunk,
        core_px=chunk_core_px(chunk, grid),
        mpp=grid.mpp,
        mpp_slide=(row["mpp_x"], row["mpp_y"]),
    )


def _best_tiles(
    plan: ReadPlan, find: _FindNuclei | None, seed: int, most: int
) -> Iterator[tuple[int, str, int, np.ndarray, np.ndarray]]:
    """Of some chunks the tile with the most nuclei, if any has one; unknown, the most varied one.

    Yields:
        Number of the chunk, its slide's id, index of the tile, pixels, nuclei in the tile's frame.
    """
    slides = OpenSlides(plan)
    for number in np.random.default_rng(seed).permutation(plan.num_chunks)[:_CHUNKS_TRIED]:
        found = _best_tile(plan, find, slides, int(number))
        if found is not None:
            yield int(number), *found
            most -= 1
        if not most:
            return


def _best_tile(
    plan: ReadPlan, find: _FindNuclei | None, slides: OpenSlides, number: int
) -> tuple[str, int, np.ndarray, np.ndarray] | None:
    slide = int(plan.slide_of(np.array([number]))[0])
    row = slides.row(slide)
    _, layout = slides.layout(slide)
    place = layout.chunk_at(int(plan.chunk_index[number]))
    chunk = slides.read(slide, place)
    nuclei = np.zeros((0, 4), np.float32) if find is None else find(row, chunk, slides.grid)
    best: tuple[float, int, np.ndarray] | None = None
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
        if tile not in chunk.bad_tiles:
            worth = len(xy) if find else float(chunk.tile(tile).std())
            if worth > (best[0] if best else 0):
                best = (worth, tile, xy)
    if best is None:
        return None
    _, tile, xy = best
    return row["slide_id"], tile, chunk.tile(tile), xy


def _rendered(
    original: np.ndarray,
    xy: np.ndarray,
    made: Any,
    policy: CropPolicy,
    global_px: int,
    local_px: int,
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
        "global_views": views_to_uint8(big.numpy(), _MEAN, _STD),
        "local_views": small,
        "outlines": crop_outlines(made.views),
    }
