"""Index one slide: open it, settle its scale, find the foreground, detect the nuclei.

The result of a slide is one Parquet part, `nuclei/<slide_id>.parquet`, whose metadata holds the
slide's row of the slide table and its quarantine rows: whole or absent, so that a run that was
killed goes on with the slides that are missing.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.config import to_plain
from cytoray.errors import InputError, SlideError
from cytoray.indexing.attempts import Attempt
from cytoray.indexing.chunks import SlideChunks, focus_byte, focus_columns
from cytoray.indexing.parts import (
    IndexedSlide,
    files_of,
    part_path,
    plain_entry,
    refused,
    write_part,
)
from cytoray.io import atomic_write_bytes
from cytoray.nuclei import (
    PrecomputedNuclei,
    build_detector,
    check_on_foreground,
)
from cytoray.patience import Patience
from cytoray.report import qc_images
from cytoray.slides import (
    DEFAULT_KEEP_SHARE,
    Grid,
    ResolvedMpp,
    SlideGrid,
    SlideReader,
    bool_to_mask,
    chunk_id,
    fingerprint,
    mask_indices,
    mpp_from_nuclei,
    open_row,
    quarantine_row,
    read_chunk,
    resolve_mpp,
    slide_foreground,
    tile_id,
)
from cytoray.slides.focus import chunk_focus
from cytoray.slides.remote import stage
from cytoray.slides.slide_table import STATUS_OK, describe_slide
from cytoray.slides.z_stack import StackReader
from cytoray.streaming.chunk_nuclei import chunk_core_px, detect_in_chunk, halo_px

_THUMBNAIL_PX = 512


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """What indexing does to every slide.

    Attributes:
        grid: tile size and mpp.
        detector: name of the nuclei detector; `none` skips detection.
        detector_kwargs: its options.
        keep_share: a tile is kept when at least this share of it is foreground.
        trust_manifest_mpp: let the manifest overrule a file that contradicts it.
        estimate_mpp: check every slide's scale by the size of its nuclei, and take that where
            nobody states one.
        min_focus: tiles with a lower focus score (0..1) are left out; those without a score stay.
        min_nuclei: tiles with fewer nuclei are left out.
        reader: `auto`, or a reader's name to insist on.
        patience: how long and how often a slide is tried.
    """

    grid: Grid
    detector: str = "classical"
    detector_kwargs: dict[str, Any] = field(default_factory=dict)
    keep_share: float = DEFAULT_KEEP_SHARE
    trust_manifest_mpp: bool = False
    estimate_mpp: bool = False
    min_focus: float = 0.0
    min_nuclei: int = 0
    reader: str = "auto"
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class _SlideWork:
    """An open slide on its way through the chunks."""

    entry: dict[str, Any]
    reader: SlideReader
    layout: SlideGrid
    scale: ResolvedMpp


class SlideIndexer:
    """Indexes slides one after another; holds the detector."""

    def __init__(self, settings: IndexSettings, out: str | Path) -> None:
        self.settings = settings
        self.out = Path(out)
        self.detect = (
            None
            if settings.detector == "none"
            else build_detector(settings.detector, **settings.detector_kwargs)
        )
        self.precomputed = self.detect if isinstance(self.detect, PrecomputedNuclei) else None

    def __call__(self, entry: dict[str, Any]) -> IndexedSlide:
        """Index one slide of the manifest; a slide that cannot be used comes back quarantined.

        Args:
            entry: a manifest row with canonical columns (`slide_id`, `path`, `mpp`, ...).
        """
        slide_id = entry["slide_id"]
        attempt = None
        try:
            attempt = Attempt(self.out, slide_id, self._key(entry), self.settings.patience)
            indexed, nuclei = self._index(entry, attempt)
        except InputError:
            raise
        except SlideError as error:
            indexed = refused(entry, error, self.settings.detector, self.out)
        except Exception as error:  # a library's own failure on one slide must not end the run
            problem = SlideError("unexpected", f"{type(error).__name__}: {error}")
            indexed = refused(entry, problem, self.settings.detector, self.out)
        else:
            write_part(part_path(self.out, slide_id), indexed, nuclei, self.settings.detector)
        if attempt is not None:
            attempt.close(finished=True)
        return indexed

    def _key(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What the result of a chunk hangs on."""
        settings = to_plain(self.settings)
        del settings["patience"]
        return {"settings": settings, "mpp": entry.get("mpp"), **files_of(entry)}

    def _index(self, entry: dict[str, Any], attempt: Attempt) -> tuple[IndexedSlide, np.ndarray]:
        settings = self.settings
        with ExitStack() as held:
            # Slides are fetched outside the watched step: downloads have time limits of their own.
            for path in entry.get("z_paths") or [entry["path"]]:
                held.enter_context(stage(path))
            with attempt.step():
                reader = held.enter_context(open_row(entry, reader=settings.reader))
            info = reader.info
            with attempt.step():
                estimated = self._estimated_mpp(reader)
            scale = resolve_mpp(
                info,
                entry.get("mpp"),
                trust_manifest_mpp=settings.trust_manifest_mpp,
                estimated=estimated,
            )
            layout = SlideGrid.of(settings.grid, info.width_px_level0, info.height_px_level0, scale)
            with attempt.step():
                foreground = slide_foreground(reader, layout, keep_share=settings.keep_share)
            row = plain_entry(entry) | describe_slide(info, scale, layout, foreground)
            work = _SlideWork(entry, reader, layout, scale)
            given = self._given_nuclei(work, foreground.mask, row)
            chunks = self._chunks(work, foreground.keep_masks, attempt)
            nuclei = chunks.nuclei if given is None else given
            row |= self._outcome(chunks, nuclei, scale)
            with attempt.step():
                self._write_pictures(work, foreground.mask, nuclei, chunks.focus)
        return IndexedSlide(row, chunks.problems, chunks.kept_focus()), nuclei

    def _outcome(
        self, chunks: SlideChunks, nuclei: np.ndarray, scale: ResolvedMpp
    ) -> dict[str, Any]:
        """The columns of a slide's row that come from its chunks.

        Raises:
            SlideError: nothing is left to use.
        """
        if not chunks.num_kept and chunks.out_of_focus:
            raise SlideError("out_of_focus", "not one tile with cells is in focus (min_focus)")
        if not chunks.num_kept:
            raise SlideError("decode_error", "not one tile with cells could be decoded")
        if self.detect and not len(nuclei):
            raise SlideError("no_nuclei", "there is foreground, but not one nucleus was found")
        least = self.settings.min_nuclei
        if self.detect and least:
            chunks.keep_with_nuclei(nuclei, least, (scale.mpp_x, scale.mpp_y))
            if not chunks.num_kept:
                reason = f"no tile has as many as {least} of the slide's {len(nuclei):,} nuclei"
                raise SlideError("no_nuclei", f"{reason} (min_nuclei)")
        return {
            "status": STATUS_OK,
            "keep_masks": chunks.keep,
            "num_tiles": chunks.num_kept,
            "num_nuclei": len(nuclei) if self.detect else None,
            "z_planes": chunks.planes,
            **focus_columns(chunks.focus),
        }

    def _given_nuclei(
        self, work: _SlideWork, mask: np.ndarray, row: dict[str, Any]
    ) -> np.ndarray | None:
        """Nuclei from a file of the user's, noted in `row`; None where they are to be detected."""
        if self.precomputed is None:
            return None
        slide_id, info, scale = work.entry["slide_id"], work.reader.info, work.scale
        size = (info.width_px_level0, info.height_px_level0)
        nuclei = self.precomputed.nuclei_of(slide_id, scale.mpp_x, scale.mpp_y, *size)
        check_on_foreground(nuclei, mask, *size)
        path = str(self.precomputed.find(slide_id))
        row |= {"nuclei_path": path, "nuclei_file": list(fingerprint(path))}
        return nuclei

    def _chunks(self, work: _SlideWork, keep: list[int], attempt: Attempt) -> SlideChunks:
        """All chunks with foreground; tiles that cannot be used are taken out."""
        reader = work.reader
        stack = isinstance(reader, StackReader)
        reads = self.detect is not None or stack or self.settings.min_focus > 0
        result = SlideChunks(keep=list(keep), layout=work.layout)
        if isinstance(reader, StackReader):
            result.planes = [reader.middle] * len(keep)
        for index, mask in enumerate(keep):
            if not mask or not reads:
                continue
            done = attempt.finished_chunk(index)
            if done is None:
                with attempt.step():
                    done = self._chunk(work, index, mask)
                attempt.finish_chunk(index, *done)
            result.add(index, *done)
        return result

    def _chunk(self, work: _SlideWork, index: int, mask: int) -> tuple[dict[str, Any], np.ndarray]:
        """One chunk: plain values for `SlideChunks.add`, and nuclei float32 (N, 4) in level 0."""
        grid, place = self.settings.grid, work.layout.chunk_at(index)
        chunk = read_chunk(work.reader, work.scale, grid, *place, halo_px=halo_px(grid.mpp))
        name = chunk_id(work.entry["slide_id"], grid, *place)
        problems = []
        for tile in mask_indices(mask).tolist():
            if tile in chunk.bad_tiles:
                mask &= ~(1 << tile)
                problem = quarantine_row(
                    work.entry["slide_id"],
                    work.entry["path"],
                    "index",
                    "decode_error",
                    chunk.bad_tiles[tile],
                    region=tile_id(name, tile),
                )
                problems.append(problem | {"time_utc": problem["time_utc"].isoformat()})
        scores = chunk_focus(chunk, grid.mpp)
        blurred = mask & bool_to_mask(scores < self.settings.min_focus)
        values = {
            "keep": mask & ~blurred,
            "blurred": blurred.bit_count(),
            "problems": problems,
            "plane": chunk.z_index,
            "focus": {t: focus_byte(float(scores[t])) for t in mask_indices(mask).tolist()},
        }
        if self.detect is None or self.precomputed is not None:
            return values, np.zeros((0, 4), np.float32)
        nuclei = detect_in_chunk(
            self.detect,
            chunk,
            core_px=chunk_core_px(chunk, grid),
            mpp=grid.mpp,
            mpp_slide=(work.scale.mpp_x, work.scale.mpp_y),
        )
        return values, nuclei

    def _estimated_mpp(self, reader: SlideReader) -> float | None:
        """um/px by the size of the nuclei; None where it is not asked for, or too few are found."""
        if not self.settings.estimate_mpp:
            return None
        detect = self.detect if self.precomputed is None else None
        try:
            return mpp_from_nuclei(reader, detect or build_detector("classical"))
        except SlideError as error:
            if error.code != "mpp_not_estimated":
                raise
            return None

    def _write_pictures(
        self, work: _SlideWork, mask: np.ndarray, nuclei: np.ndarray, focus: np.ndarray
    ) -> None:
        layout, slide_id = work.layout, work.entry["slide_id"]
        thumbnail = work.reader.thumbnail(_THUMBNAIL_PX)
        scale = thumbnail.shape[1] / work.reader.info.width_px_level0
        side = layout.grid.tile_px * scale
        span = (
            layout.tile_columns * side * layout.scale_x,
            layout.tile_rows * side * layout.scale_y,
        )
        pictures = qc_images(
            thumbnail,
            mask,
            nuclei[:, :2] * scale,
            focus=None if np.isnan(focus).all() else focus,
            focus_span_thumb=span,
        )
        for name, data in pictures.items():
            atomic_write_bytes(self.out / "qc" / f"{slide_id}.{name}.jpg", data)
