"""What a pretraining could not read, as one table: from the lines its workers wrote down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from cytoray.errors import reason_code
from cytoray.patience import GIVEN_UP
from cytoray.runs import read_events
from cytoray.slides import parse_tile_id, quarantine_row, write_quarantine
from cytoray.slides.slide_table import iter_slide_table
from cytoray.streaming.plan import ReadPlan

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute


def quarantine_facts(index: Path, out: Path, plan: ReadPlan) -> dict[str, Any]:
    """Write `quarantine.parquet` of a run, and count for its summary.

    Args:
        index: folder written by `cytoray index`.
        out: folder of the run.
        plan: what was read.
    """
    table = out / "quarantine.parquet"
    rows = list(_tile_rows(out, plan))
    write_quarantine(rows, table)
    before = _quarantined_by_index(index)
    given_up = {row["slide_id"] for row in rows if row["reason_code"] in GIVEN_UP}
    tables = [str(index / "quarantine.parquet")] if before else []
    return {
        "num_quarantined_slides": before + len(given_up),
        "num_quarantined_tiles": len(rows),
        "quarantine": ", ".join([*tables, str(table)]),
    }


def _quarantined_by_index(index: Path) -> int:
    statuses = iter_slide_table(str(index / "slides.parquet"), ["status"])
    return sum(status != "ok" for batch in statuses for status in batch["status"].to_pylist())


def _tile_rows(out: Path, plan: ReadPlan) -> Iterator[dict[str, Any]]:
    """A row a tile, though it was met in several epochs or by several workers."""
    files = sorted(out.glob("quarantine-rank*.jsonl"))
    messages = {tile["tile_id"]: tile["message"] for path in files for tile in read_events(path)}
    slides = {tile: parse_tile_id(tile)[0] for tile in messages}
    wanted = pc.is_in(
        plan.slides["slide_id"], value_set=pa.array(set(slides.values()), pa.string())
    )
    found = plan.slides.select(["slide_id", "path"]).filter(wanted)
    paths = dict(zip(*(column.to_pylist() for column in found.columns), strict=True))
    for tile, message in messages.items():
        slide_id = slides[tile]
        code = reason_code(message)
        yield quarantine_row(slide_id, paths.get(slide_id, ""), "pretrain", code, message, tile)
