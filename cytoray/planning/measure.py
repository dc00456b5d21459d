"""One slide of the sample: opened, its foreground found, and a few of its chunks really processed.

Times are CPU seconds of this process (user and system), so that a busy machine does not spoil
them; waiting for storage is not in them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cytoray.errors import SlideError
from cytoray.nuclei import build_detector
from cytoray.perturb import CropPolicy, PerturbConfig, tile_rng
from cytoray.slides import (
    DEFAULT_KEEP_SHARE,
    ChunkPixels,
    Grid,
    ResolvedMpp,
    SlideGrid,
    SlideReader,
    mask_indices,
    open_row,
    read_chunk,
    resolve_mpp,
    slide_foreground,
)
from cytoray.slides.focus import chunk_focus
from cytoray.streaming.chunk_nuclei import chunk_core_px, detect_in_chunk, halo_px, to_tile_frame


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """What is done to the sampled slides.

    Attributes:
        grid: tile size and mpp.
        detector: name of the nuclei detector; `none`: no detection.
        keep_share: a tile is kept when at least this share of it is foreground.
        min_focus: tiles less sharp than this are left out.
        min_nuclei: tiles with fewer nuclei are left out.
        trust_manifest_mpp: let the manifest overrule a file that contradicts it.
        chunks_per_slide: chunks read of each slide.
        policy: crops and augmentations; None: tiles are not perturbed.
        perturb: nuclei-centred perturbation.
        seed: of the choice of chunks.
    """

    grid: Grid
    detector: str = "classical"
    keep_share: float = DEFAULT_KEEP_SHARE
    min_focus: float = 0.0
    min_nuclei: int = 0
    trust_manifest_mpp: bool = False
    chunks_per_slide: int = 3
    policy: CropPolicy | None = None
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SlideMeasure:
    """What a slide of the sample has and costs. Of a slide that would be quarantined all is 0.

    Attributes:
        slide_id: the slide.
        file_bytes: size of its file.
        tiles: tiles that would be used.
        chunks: chunks that hold one.
        nuclei: expected in all of them.
        bad_tiles: tiles expected not to be decodable.
        slide_bytes: bytes read from the file to open it and find its foreground.
        chunk_bytes: bytes read from the file for all chunks.
        slide_s: seconds once for the slide: opening it and finding its foreground.
        read_s, detect_s, perturb_s: seconds for all its tiles.
        reason: why it would be quarantined; empty: it would not.
        message: the same in a sentence.
    """

    slide_id: str
    file_bytes: int = 0
    tiles: float = 0.0
    chunks: float = 0.0
    nuclei: float = 0.0
    bad_tiles: float = 0.0
    slide_bytes: float = 0.0
    chunk_bytes: float = 0.0
    slide_s: float = 0.0
    read_s: float = 0.0
    detect_s: float = 0.0
    perturb_s: float = 0.0
    reason: str = ""
    message: str = ""


@dataclass
class _Sums:
    tiles: int = 0
    bad: int = 0
    used: int = 0
    nuclei: int = 0
    bytes: int = 0
    read_s: float = 0.0
    detect_s: float = 0.0
    perturb_s: float = 0.0


def measure_slide(row: Mapping[str, Any], settings: MeasureSettings) -> SlideMeasure:
    """Measure one slide; a slide that would be quarantined says so.

    Args:
        row: `slide_id`, `path`, and where known `mpp` and `file_size_bytes`.
        settings: what to do with it.
    """
    cv2.setNumThreads(1)  # figures are for one core
    slide_id, size = str(row["slide_id"]), int(row.get("file_size_bytes") or 0)
    try:
        return _measure(row, size, settings)
    except SlideError as error:
        code, message = error.code, error.message
    except Exception as error:  # a library's own failure on one slide must not end the plan
        code, message = "unexpected", f"{type(error).__name__}: {error}"
    return SlideMeasure(slide_id=slide_id, file_bytes=size, reason=code, message=message)


def _measure(row: Mapping[str, Any], size: int, settings: MeasureSettings) -> SlideMeasure:
    began, bytes_before = time.process_time(), bytes_read()
    with open_row(row) as reader:
        info = reader.info
        scale = resolve_mpp(info, row.get("mpp"), trust_manifest_mpp=settings.trust_manifest_mpp)
        layout = SlideGrid.of(settings.grid, info.width_px_level0, info.height_px_level0, scale)
        foreground = slide_foreground(reader, layout, keep_share=settings.keep_share)
        slide_s, slide_bytes = time.process_time() - began, bytes_read() - bytes_before
        masks = np.array(foreground.keep_masks, np.uint64)
        kept = np.flatnonzero(masks)
        rng = tile_rng(settings.seed, 0, str(row["slide_id"]))
        chosen = rng.permutation(kept)[: settings.chunks_per_slide]
        sums = _Sums()
        work = _ChunkWork(settings, scale, layout, reader)
        for chunk in chosen.tolist():
            work(chunk, mask_indices(int(masks[chunk])).tolist(), sums)
    whole = len(chosen) == len(kept)
    if whole and sums.bad == sums.tiles:
        raise SlideError("decode_error", "not one tile with cells could be decoded")
    if whole and settings.detector != "none" and not sums.nuclei:
        raise SlideError("no_nuclei", "there is foreground, but not one nucleus was found")
    if whole and not sums.used:
        raise SlideError(*work.why_none)
    times = foreground.num_tiles / sums.tiles  # a ratio: chunks hold unequal numbers of tiles
    return SlideMeasure(
        slide_id=str(row["slide_id"]),
        file_bytes=size,
        tiles=sums.used * times,
        chunks=float(len(kept)),
        nuclei=sums.nuclei * times,
        bad_tiles=sums.bad * times,
        slide_bytes=slide_bytes,
        chunk_bytes=sums.bytes * times,
        slide_s=slide_s,
        read_s=sums.read_s * times,
        detect_s=sums.detect_s * times,
        perturb_s=sums.perturb_s * times,
    )


class _ChunkWork:
    """Reads, searches and perturbs chunks of one slide as indexing and pretraining do."""

    def __init__(
        self, settings: MeasureSettings, scale: ResolvedMpp, layout: SlideGrid, reader: SlideReader
    ) -> None:
        self.settings, self.scale, self.layout, self.reader = settings, scale, layout, reader
        self.detect = None if settings.detector == "none" else build_detector(settings.detector)
        self.why_none = ("out_of_focus", "not one tile with cells is in focus (min_focus)")

    def __call__(self, chunk_index: int, tiles: list[int], sums: _Sums) -> None:
        grid, place = self.settings.grid, self.layout.chunk_at(chunk_index)
        bytes_before, began = bytes_read(), time.process_time()
        chunk = read_chunk(self.reader, self.scale, grid, *place, halo_px=halo_px(grid.mpp))
        sums.read_s += time.process_time() - began
        sums.bytes += bytes_read() - bytes_before
        sums.tiles += len(tiles)
        good = [tile for tile in tiles if tile not in chunk.bad_tiles]
        sums.bad += len(tiles) - len(good)
        began = time.process_time()
        nuclei = self._nuclei(chunk)
        sums.detect_s += time.process_time() - began
        sums.nuclei += len(nuclei)
        used = self._used(chunk, good, place, nuclei)
        sums.used += len(used)
        began = time.process_time()
        if self.settings.policy is not None:
            for tile, xy in used.items():
                self._perturb(chunk.tile(tile), xy, place, tile, self.settings.policy)
        sums.perturb_s += time.process_time() - began

    def _used(
        self, chunk: ChunkPixels, tiles: list[int], place: tuple[int, int], nuclei: np.ndarray
    ) -> dict[int, np.ndarray]:
        """Tiles that are sharp enough and hold enough nuclei, each with the nuclei in its frame."""
        settings = self.settings
        if settings.min_focus:
            scores = chunk_focus(chunk, settings.grid.mpp)
            tiles = [tile for tile in tiles if not scores[tile] < settings.min_focus]
        within = {tile: self._nuclei_of(tile, place, nuclei) for tile in tiles}
        if self.detect is None or not settings.min_nuclei:
            return within
        if tiles:
            least = f"no tile has as many as {settings.min_nuclei} nuclei (min_nuclei)"
            self.why_none = ("no_nuclei", least)
        return {tile: xy for tile, xy in within.items() if len(xy) >= settings.min_nuclei}

    def _nuclei_of(self, tile: int, place: tuple[int, int], nuclei: np.ndarray) -> np.ndarray:
        grid, (x, y, _, _) = self.settings.grid, self.layout.tile_rect_px(*place, tile)
        xy = to_tile_frame(
            nuclei,
            mpp=grid.mpp,
            mpp_slide=(self.scale.mpp_x, self.scale.mpp_y),
            tile_x_px=x,
            tile_y_px=y,
        )
        return xy[np.all((xy >= 0) & (xy < grid.tile_px), axis=1)]

    def _nuclei(self, chunk: ChunkPixels) -> np.ndarray:
        if self.detect is None:
            return np.zeros((0, 4), np.float32)
        grid = self.settings.grid
        return detect_in_chunk(
            self.detect,
            chunk,
            core_px=chunk_core_px(chunk, grid),
            mpp=grid.mpp,
            mpp_slide=(self.scale.mpp_x, self.scale.mpp_y),
        )

    def _perturb(
        self,
        pixels: np.ndarray,
        nuclei_xy: np.ndarray,
        place: tuple[int, int],
        tile: int,
        policy: CropPolicy,
    ) -> None:
        settings = self.settings
        rng = tile_rng(settings.seed, 0, f"{place}:{tile}")
        settings.perturb.views(pixels, nuclei_xy, policy, rng, mpp=settings.grid.mpp)


def bytes_read() -> int:
    """Bytes this process has asked files for so far; 0 where the system does not count them."""
    try:
        found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0
