"""The finished part of a slide: its nuclei, with its row and its problems in the same file."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.errors import SlideError
from cytoray.indexing.chunks import dated
from cytoray.nuclei import read_part_metadata, write_nuclei
from cytoray.slides import fingerprint, row_from_error
from cytoray.slides.slide_table import STATUS_OK


@dataclass
class IndexedSlide:
    """What indexing knows of a slide.

    Attributes:
        row: its row of the slide table.
        quarantine: the quarantine rows it caused.
        tile_focus: one byte a kept tile, chunk by chunk in the order of the masks' bits: 250 times
            the focus score, 255 where it cannot be told; empty where no chunk was read.
    """

    row: dict[str, Any]
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    tile_focus: bytes = b""

    @property
    def ok(self) -> bool:
        return self.row["status"] == STATUS_OK


def plain_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """The slide's own columns of the manifest; the mpp it states is kept apart from the result."""
    row = {name: value for name, value in entry.items() if name not in ("mpp", "z", "z_values")}
    row["manifest_mpp"] = entry.get("mpp")
    row["file_size_bytes"], row["file_mtime_ns"] = files_of(entry)["file"]
    return row


def files_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The files of a slide and their state: bytes of all of them, and the newest change."""
    planes = entry.get("z_paths")
    states = [fingerprint(path) for path in planes or [entry["path"]]]
    sizes, times = zip(*states, strict=True)
    known = None not in sizes and None not in times
    state = [sum(sizes), max(times)] if known else [None, None]
    return {"path": entry["path"], "z_paths": planes, "file": state}


def refused(entry: dict[str, Any], error: SlideError, detector: str, out: Path) -> IndexedSlide:
    """Quarantine a whole slide: write its part with the reason and no nuclei."""
    row = plain_entry(entry) | {"status": error.code}
    problem = row_from_error(entry["slide_id"], entry["path"], "index", error)
    indexed = IndexedSlide(row, [problem])
    none = np.zeros((0, 4), np.float32)
    write_part(part_path(out, entry["slide_id"]), indexed, none, detector)
    return indexed


def write_part(part: Path, indexed: IndexedSlide, nuclei: np.ndarray, detector: str) -> None:
    metadata = {
        # Labels are taken from the manifest later; here a date among them need only be writable.
        "row": json.dumps(indexed.row, default=str),
        "quarantine": json.dumps(indexed.quarantine, default=datetime.isoformat),
        "tile_focus": base64.b64encode(indexed.tile_focus).decode(),
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
    problems = [dated(problem) for problem in json.loads(metadata["quarantine"])]
    focus = base64.b64decode(metadata["tile_focus"])
    return IndexedSlide(json.loads(metadata["row"]), problems, focus)


def is_finished(out: str | Path, entry: dict[str, Any]) -> bool:
    """Whether the slide was indexed without fault, from this file and with this mpp stated.

    A slide that was quarantined is tried again: the file may have been mended.
    """
    indexed = read_indexed(part_path(out, entry["slide_id"]))
    if indexed is None or not indexed.ok:
        return False
    row = indexed.row
    if row.get("nuclei_path") and row["nuclei_file"] != list(fingerprint(row["nuclei_path"])):
        return False
    names = ("path", "z_paths", "manifest_mpp", "file_size_bytes", "file_mtime_ns")
    now = files_of(entry)
    return [row.get(name) for name in names] == [
        now["path"], now["z_paths"], entry.get("mpp"), *now["file"]
    ]  # fmt: skip
