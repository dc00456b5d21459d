"""Which slides to look at: drawn from batches of rows, spread over sites and file sizes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from cytoray.errors import InputError
from cytoray.slides import fingerprint, iter_slide_table

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute

_SAMPLED = ("slide_id", "path", "site", "mpp_x", "file_size_bytes")
# Candidates for each slide of the sample, whose file sizes are looked up.
_CANDIDATES_PER_SLIDE = 8
_CANDIDATES = 64


def sample_slides(
    batches: Iterable[pa.RecordBatch], count: int, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """A random sample of slides in which sites and file sizes stand as in the whole.

    Some hundred candidates are drawn by chance, in one pass; only their sizes are looked up.
    Sorted by site and size, every k-th of them is taken from a random start, so that every slide
    has the same chance and the sample needs no weights.

    Args:
        batches: rows with `slide_id`, `path` and `site`, e.g. of a manifest or a slide table.
        count: slides wanted; all of them where there are fewer.
        seed: the same sample for the same rows and seed.

    Returns:
        (rows of the sample, each with `file_size_bytes`, ordered by site and size; number of rows
        seen).
    """
    rng = np.random.default_rng(seed)
    most = max(_CANDIDATES, _CANDIDATES_PER_SLIDE * count)
    kept: list[tuple[float, dict[str, Any]]] = []
    seen = 0
    for batch in batches:
        keys = rng.random(batch.num_rows)
        seen += batch.num_rows
        limit = kept[-1][0] if len(kept) == most else 1.0
        here = np.flatnonzero(keys < limit)
        here = here[np.argsort(keys[here])[:most]]
        rows = batch.take(pa.array(here)).to_pylist()
        kept += zip(keys[here].tolist(), rows, strict=True)
        kept = sorted(kept, key=lambda pair: pair[0])[:most]
    candidates = [row | {"file_size_bytes": _size(row)} for _, row in kept]
    candidates.sort(key=lambda r: (r.get("site") or "", r["file_size_bytes"], r["slide_id"]))
    if len(candidates) <= count:
        return candidates, seen
    step = len(candidates) / count
    places = (rng.random() + np.arange(count)) * step
    return [candidates[int(place)] for place in places], seen


@dataclass(frozen=True, kw_only=True)
class IndexFacts:
    """What an index has counted.

    Attributes:
        num_slides: slides that can be used.
        num_quarantined: slides that cannot.
        num_tiles: tiles of the usable slides.
        num_nuclei: their nuclei; None where they were not detected.
        tile_px, mpp: of the tiles.
    """

    num_slides: int
    num_quarantined: int
    num_tiles: int
    num_nuclei: int | None
    tile_px: int
    mpp: float


def index_facts(slides: str | os.PathLike[str]) -> IndexFacts:
    """Sums over a slide table, batch by batch.

    Raises:
        InputError: there is none, or no slide of it can be used.
    """
    names = ["status", "num_tiles", "num_nuclei", "grid_tile_px", "grid_mpp"]
    usable = refused = tiles = nuclei = 0
    detected, grid = False, None
    for batch in iter_slide_table(slides, names):
        good = batch.filter(pc.equal(batch.column("status"), "ok"))
        usable += good.num_rows
        refused += batch.num_rows - good.num_rows
        tiles += pc.sum(good.column("num_tiles")).as_py() or 0
        nuclei += pc.sum(good.column("num_nuclei")).as_py() or 0
        detected = detected or good.column("num_nuclei").null_count < good.num_rows
        if grid is None and good.num_rows:
            grid = good.column("grid_tile_px")[0].as_py(), good.column("grid_mpp")[0].as_py()
    if grid is None:
        raise InputError(f"no slide of {os.fspath(slides)} can be used; see its quarantine")
    return IndexFacts(
        num_slides=usable,
        num_quarantined=refused,
        num_tiles=tiles,
        num_nuclei=nuclei if detected else None,
        tile_px=grid[0],
        mpp=grid[1],
    )


def usable_rows(slides: str | os.PathLike[str]) -> Iterator[pa.RecordBatch]:
    """Columns for `sample_slides` of a table's usable slides; `mpp` is the settled one."""
    for batch in iter_slide_table(slides, [*_SAMPLED, "status"]):
        good = batch.filter(pc.equal(batch.column("status"), "ok")).select(list(_SAMPLED))
        yield good.rename_columns(["mpp" if name == "mpp_x" else name for name in _SAMPLED])


def _size(row: dict[str, Any]) -> int:
    if row.get("file_size_bytes"):
        return int(row["file_size_bytes"])
    return fingerprint(row["path"])[0] or 0
