"""Index a cohort: one slide to an actor, one Parquet part a slide, tables at the end."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from cytoray.distributed.cluster import Shared
from cytoray.distributed.tile_source import Positions, quiet_data_context
from cytoray.errors import SlideError
from cytoray.indexing import (
    IndexSettings,
    SlideIndexer,
    is_finished,
    part_path,
    read_indexed,
    refused,
)
from cytoray.progress import Progress
from cytoray.slides import Manifest, slide_schema, write_quarantine, write_slide_table


class IndexSlides:
    """Ray Data stage: positions in the manifest -> one row a slide; the parts are written here."""

    def __init__(self, manifest: Shared, settings: IndexSettings, out: str) -> None:
        cv2.setNumThreads(1)  # the actor's share is one core
        self.rows: pa.Table = manifest.get()
        self.indexer = SlideIndexer(settings, out)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for position in batch["position"].tolist():
            began = time.perf_counter()
            entry = self.rows.slice(position, 1).to_pylist()[0]
            indexed = self.indexer(entry)
            yield {
                "slide_id": np.array([entry["slide_id"]]),
                "ok": np.array([indexed.ok]),
                "num_tiles": np.array([indexed.row.get("num_tiles") or 0], np.int64),
                "seconds": np.array([time.perf_counter() - began]),
            }


def index_slides(
    rows: pa.Table, settings: IndexSettings, out: Path, *, progress: Progress, max_actors: int = 0
) -> list[str]:
    """Index every slide of the manifest that has no finished part yet.

    Args:
        rows: manifest rows with canonical columns, paths absolute.
        settings: what is done to each slide.
        out: the run folder, visible from every node.
        progress: shown while it runs.
        max_actors: actors at most; 0: as many as there are CPUs.

    Returns:
        slide_ids whose worker died each time it was tried.
    """
    todo = np.array([not is_finished(out, entry) for entry in rows.to_pylist()], dtype=bool)
    total = rows.num_rows
    count, tiles = total - int(todo.sum()), 0
    progress.update("slides", count, total, "slides")
    if not todo.any():
        return []
    pending = rows.filter(pa.array(todo))
    for slide_id in pending.column("slide_id").to_pylist():
        part_path(out, slide_id).unlink(missing_ok=True)
    for batch in _stream(pending, settings, out, max_actors):
        count += len(batch["slide_id"])
        tiles += int(batch["num_tiles"].sum())
        progress.update("slides", count, total, "slides", detail=f"{tiles:,} tiles")
    lost = [s for s in pending.column("slide_id").to_pylist() if not part_path(out, s).exists()]
    for slide_id in lost:
        _give_up(pending, slide_id, settings, out)
    return lost


def _stream(
    rows: pa.Table, settings: IndexSettings, out: Path, max_actors: int
) -> Iterator[dict[str, np.ndarray]]:
    context = ray.data.DataContext.get_current()
    quiet_data_context()
    context.execution_options.preserve_order = False
    context.target_max_block_size = 1  # one slide to a block: a crash costs that slide alone
    context.max_errored_blocks = -1
    cpus = ray.cluster_resources().get("CPU", 1.0)
    actors = max(1, min(max_actors or int(cpus), rows.num_rows, int(cpus)))
    each = max(0.1, min(1.0, (cpus - 0.1) / actors))
    positions = ray.data.read_datasource(
        Positions(0, rows.num_rows), num_cpus=0.1, override_num_blocks=1
    )
    with warnings.catch_warnings():  # no named parameter replaces this one
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = positions.map_batches(
            IndexSlides,  # type: ignore[arg-type]
            fn_constructor_args=(Shared(rows), settings, str(out)),
            batch_size=None,
            num_cpus=each,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
            # Once more than it is tried: the last one finds that the tries are used up.
            max_task_retries=settings.patience.max_tries,
        )
    batches: Any = dataset.iter_batches(batch_size=None, prefetch_batches=1)
    yield from batches


def _give_up(rows: pa.Table, slide_id: str, settings: IndexSettings, out: Path) -> None:
    """Quarantine a slide whose reader died every time."""
    entry = next(r for r in rows.to_pylist() if r["slide_id"] == slide_id)
    problem = SlideError("reader_crashed", "the processes reading it died before they could begin")
    refused(entry, problem, settings, out)


def merge_parts(manifest: Manifest, out: Path) -> tuple[pa.Table, pa.Table]:
    """Write `slides.parquet` and `quarantine.parquet` from the parts.

    Labels and splits are taken as the manifest has them now.

    Returns:
        the slide table and the quarantine table.
    """
    rows: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = []
    for entry in manifest.iter_rows():
        indexed = read_indexed(part_path(out, entry["slide_id"]))
        assert indexed is not None, f"no part for {entry['slide_id']}"
        rows.append(indexed.row | {k: v for k, v in entry.items() if k not in ("mpp", "z")})
        problems += indexed.quarantine
    schema = slide_schema(manifest.rows.schema, manifest.label_columns)
    return (
        write_slide_table(rows, out / "slides.parquet", schema),
        write_quarantine(problems, out / "quarantine.parquet"),
    )
