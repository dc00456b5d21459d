"""Index one slide: open it, settle its scale, find the foreground, detect the nuclei.

The result of a slide is one Parquet part, `nuclei/<slide_id>.parquet`, whose metadata holds the
slide's row of the slide table and its quarantine rows: whole or absent, so that a run that was
killed goes on with the slides that are missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.attempts import Attempt, Patience
from cytoray.config import to_plain
from cytoray.errors import InputError, SlideError
from cytoray.io import atomic_write_bytes
from cytoray.nuclei import build_detector, read_part_metadata, write_nuclei
from cytoray.report import qc_images
from cytoray.slides import (
    DEFAULT_KEEP_SHARE,
    Grid,
    ResolvedMpp,
    SlideGrid,
    SlideReader,
    chunk_id,
    fingerprint,
    mask_indices,
    open_slide,
    quarantine_row,
    read_chunk,
    resolve_mpp,
    row_from_error,
    slide_foreground,
    tile_id,
)
from cytoray.slides.remote import stage
from cytoray.slides.slide_table import STATUS_OK, describe_slide
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
        reader: `auto`, or a reader's name to insist on.
        patience: how long and how often a slide is tried.
    """

    grid: Grid
    detector: str = "classical"
    detector_kwargs: dict[str, Any] = field(default_factory=dict)
    keep_share: float = DEFAULT_KEEP_SHARE
    trust_manifest_mpp: bool = False
    reader: str = "auto"
    patience: Patience = field(default_factory=Patience)


@dataclass
class IndexedSlide:
    """A slide's row of the slide table and the quarantine rows it caused."""

    row: dict[str, Any]
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.row["status"] == STATUS_OK


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
            indexed = refused(entry, error, self.settings, self.out)
        except Exception as error:  # a library's own failure on one slide must not end the run
            problem = SlideError("unexpected", f"{type(error).__name__}: {error}")
            indexed = refused(entry, problem, self.settings, self.out)
        else:
            _write_part(part_path(self.out, slide_id), indexed, nuclei, self.settings.detector)
        if attempt is not None:
            attempt.close(finished=True)
        return indexed

    def _key(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What the result of a chunk hangs on."""
        settings = to_plain(self.settings)
        del settings["patience"]
        return {"settings": settings, "mpp": entry.get("mpp"), "path": entry["path"],
                "file": fingerprint(entry["path"])}  # fmt: skip

    def _index(self, entry: dict[str, Any], attempt: Attempt) -> tuple[IndexedSlide, np.ndarray]:
        settings = self.settings
        # A slide is fetched outside the watched step: downloads have time limits of their own.
        with stage(entry["path"]), attempt.step():
            reader = open_slide(entry["path"], reader=settings.reader)
        with reader:
            info = reader.info
            scale = resolve_mpp(
                info, entry.get("mpp"), trust_manifest_mpp=settings.trust_manifest_mpp
            )
            layout = SlideGrid.of(settings.grid, info.width_px_level0, info.height_px_level0, scale)
            with attempt.step():
                foreground = slide_foreground(reader, layout, keep_share=settings.keep_share)
            row = plain_entry(entry) | describe_slide(info, scale, layout, foreground)
            work = _SlideWork(entry, reader, layout, scale)
            nuclei, problems, keep = self._chunks(work, foreground.keep_masks, attempt)
            kept = sum(mask.bit_count() for mask in keep)
            if not kept:
                raise SlideError("decode_error", "not one tile with cells could be decoded")
            if self.detect and not len(nuclei):
                raise SlideError("no_nuclei", "there is foreground, but not one nucleus was found")
            row |= {
                "status": STATUS_OK,
                "keep_masks": keep,
                "num_tiles": kept,
                "num_nuclei": len(nuclei) if self.detect else None,
            }
            with attempt.step():
                self._write_pictures(reader, entry["slide_id"], foreground.mask, nuclei)
        return IndexedSlide(row, problems), nuclei

    def _chunks(
        self, work: _SlideWork, keep: list[int], attempt: Attempt
    ) -> tuple[np.ndarray, list[dict[str, Any]], list[int]]:
        """Nuclei of all chunks with foreground; tiles that cannot be decoded are taken out."""
        found: list[np.ndarray] = [np.zeros((0, 4), np.float32)]
        problems: list[dict[str, Any]] = []
        keep = list(keep)
        for index, mask in enumerate(keep):
            if not mask or self.detect is None:
                continue
            done = attempt.finished_chunk(index)
            if done is None:
                with attempt.step():
                    done = self._chunk(work, index, mask)
                attempt.finish_chunk(index, *done)
            values, nuclei = done
            keep[index] = values["keep"]
            problems += [_dated(problem) for problem in values["problems"]]
            found.append(nuclei)
        return np.concatenate(found), problems, keep

    def _chunk(self, work: _SlideWork, index: int, mask: int) -> tuple[dict[str, Any], np.ndarray]:
        """One chunk: the tiles kept, the problems found, and nuclei float32 (N, 4) in level 0."""
        grid, place = self.settings.grid, work.layout.chunk_at(index)
        assert self.detect is not None
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
        nuclei = detect_in_chunk(
            self.detect,
            chunk,
            core_px=chunk_core_px(chunk, grid),
            mpp=grid.mpp,
            mpp_slide=(work.scale.mpp_x, work.scale.mpp_y),
        )
        return {"keep": mask, "problems": problems}, nuclei

    def _write_pictures(
        self, reader: SlideReader, slide_id: str, mask: np.ndarray, nuclei: np.ndarray
    ) -> None:
        thumbnail = reader.thumbnail(_THUMBNAIL_PX)
        scale = thumbnail.shape[1] / reader.info.width_px_level0
        for name, data in qc_images(thumbnail, mask, nuclei[:, :2] * scale).items():
            atomic_write_bytes(self.out / "qc" / f"{slide_id}.{name}.jpg", data)


def plain_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """The slide's own columns of the manifest; the mpp it states is kept apart from the result."""
    row = {name: value for name, value in entry.items() if name not in ("mpp", "z")}
    row["manifest_mpp"] = entry.get("mpp")
    row["file_size_bytes"], row["file_mtime_ns"] = fingerprint(entry["path"])
    return row


def refused(
    entry: dict[str, Any], error: SlideError, settings: IndexSettings, out: Path
) -> IndexedSlide:
    """Quarantine a whole slide: write its part with the reason and no nuclei."""
    row = plain_entry(entry) | {"status": error.code}
    problem = row_from_error(entry["slide_id"], entry["path"], "index", error)
    indexed = IndexedSlide(row, [problem])
    none = np.zeros((0, 4), np.float32)
    _write_part(part_path(out, entry["slide_id"]), indexed, none, settings.detector)
    return indexed


def _write_part(part: Path, indexed: IndexedSlide, nuclei: np.ndarray, detector: str) -> None:
    metadata = {
        # Labels are taken from the manifest later; here a date among them need only be writable.
        "row": json.dumps(indexed.row, default=str),
        "quarantine": json.dumps(indexed.quarantine, default=datetime.isoformat),
    }
    write_nuclei(part, indexed.row["slide_id"], nuclei, detector, metadata)


def part_path(out: str | Path, slide_id: str) -> Path:
    """Where a slide's nuclei and its row are kept."""
    return Path(out) / "nuclei" / f"{slide_id}.parquet"


def read_indexed(part: Path) -> IndexedSlide | None:
    """The row kept in a finished part, or None when there is none."""
    if not part.exists():
        return None
    metadata = read_part_metadata(part)
    problems = [_dated(problem) for problem in json.loads(metadata["quarantine"])]
    return IndexedSlide(json.loads(metadata["row"]), problems)


def _dated(problem: dict[str, Any]) -> dict[str, Any]:
    """A quarantine row as it came from JSON, its time a time again."""
    return problem | {"time_utc": datetime.fromisoformat(problem["time_utc"])}


def is_finished(out: str | Path, entry: dict[str, Any]) -> bool:
    """Whether the slide was indexed without fault, from this file and with this mpp stated.

    A slide that was quarantined is tried again: the file may have been mended.
    """
    indexed = read_indexed(part_path(out, entry["slide_id"]))
    if indexed is None or not indexed.ok:
        return False
    known = tuple(
        indexed.row[name] for name in ("path", "manifest_mpp", "file_size_bytes", "file_mtime_ns")
    )
    return known == (entry["path"], entry.get("mpp"), *fingerprint(entry["path"]))
