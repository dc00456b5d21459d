"""Index a cohort: one slide to an actor, one Parquet part a slide, tables at the end.

What the driver holds does not grow with the slides but for a few numbers each: it hands out
positions in the manifest, whose rows lie in the object store, and takes back a few figures a slide.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute
import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from cytoray.distributed.cluster import Shared
from cytoray.distributed.tile_source import Positions, quiet_data_context
from cytoray.errors import SlideError
from cytoray.indexing import (
    IndexedSlide,
    IndexSettings,
    SlideIndexer,
    is_finished,
    part_path,
    read_indexed,
    refused,
)
from cytoray.progress import Progress
from cytoray.slides import QUARANTINE_SCHEMA, Manifest, slide_schema, write_slide_table
from cytoray.spool import RowSpool, iter_taken, write_parquet_batches

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute

# Slides handed to Ray Data at a time: it keeps figures of every block until its dataset ends.
_SLIDES_AT_ONCE = 4096
# Finished parts are looked at by so many slides a task; fewer than that, here in the driver.
_LOOKED_AT = 500
# Parts opened at once while the tables are written: what one waits for is storage.
_OPEN_PARTS = 16


class IndexSlides:
    """Ray Data stage: places in `todo` -> one row a slide; the parts are written here."""

    def __init__(
        self, manifest: Shared, todo: np.ndarray, settings: IndexSettings, out: str
    ) -> None:
        cv2.setNumThreads(1)  # the actor's share is one core
        self.rows: pa.Table = manifest.get()
        self.todo = todo
        self.indexer = SlideIndexer(settings, out)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for place in batch["position"].tolist():
            began = time.perf_counter()
            position = int(self.todo[place])
            indexed = self.indexer(_entry(self.rows, position))
            yield {
                "position": np.array([position]),
                "num_tiles": np.array([indexed.row.get("num_tiles") or 0], np.int64),
                "seconds": np.array([time.perf_counter() - began]),
            }


def index_slides(
    rows: pa.Table, settings: IndexSettings, out: Path, *, progress: Progress, max_actors: int = 0
) -> list[str]:
    """Index every slide of the manifest that has no finished part yet.

    A slide whose reader hangs or dies costs one actor, which Ray replaces; the others go on. The
    slide is tried again where it stood, and quarantined when `settings.patience` is used up.

    Args:
        rows: manifest rows with canonical columns, paths absolute.
        settings: what is done to each slide.
        out: the run folder, visible from every node.
        progress: shown while it runs.
        max_actors: actors at most; 0: as many as there are CPUs.

    Returns:
        slide_ids whose worker died each time it was tried.
    """
    total = rows.num_rows
    shared = Shared(rows)
    todo = _unfinished(rows, shared, out, progress)
    before = total - len(todo)
    count, tiles, lost = before, 0, []
    detail = f"{before:,} of them before" if before else ""
    progress.update("slides", count, total, "slides", detail=detail)

    for first in range(0, len(todo), _SLIDES_AT_ONCE):
        part = todo[first : first + _SLIDES_AT_ONCE]
        answered = set()
        for batch in _stream(shared, part, settings, out, max_actors):
            answered.update(batch["position"].tolist())
            tiles += int(batch["num_tiles"].sum())
            count += len(batch["position"])
            more = f", {before:,} of the slides before" if before else ""
            progress.update("slides", count, total, "slides", detail=f"{tiles:,} tiles{more}")
        for position in part.tolist():
            if position not in answered:
                lost.append(_give_up(_entry(rows, position), settings, out))
    return lost


def _stream(
    rows: Shared, todo: np.ndarray, settings: IndexSettings, out: Path, max_actors: int
) -> Iterator[dict[str, np.ndarray]]:
    context = ray.data.DataContext.get_current()
    quiet_data_context()
    context.execution_options.preserve_order = False
    context.target_max_block_size = 1  # one slide to a block: a crash costs that slide alone
    context.max_errored_blocks = -1
    cpus = ray.cluster_resources().get("CPU", 1.0)
    actors = max(1, min(max_actors or int(cpus), len(todo), int(cpus)))
    each = max(0.1, min(1.0, (cpus - 0.1) / actors))
    positions = ray.data.read_datasource(
        Positions(0, len(todo)), num_cpus=0.1, override_num_blocks=1
    )
    with warnings.catch_warnings():  # no named parameter replaces this one
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = positions.map_batches(
            IndexSlides,  # type: ignore[arg-type]
            fn_constructor_args=(rows, todo, settings, str(out)),
            batch_size=None,
            num_cpus=each,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
            # Once more than it is tried: the last one finds that the tries are used up.
            max_task_retries=settings.patience.max_tries,
        )
    batches: Any = dataset.iter_batches(batch_size=None, prefetch_batches=1)
    yield from batches


def _entry(rows: pa.Table, position: int) -> dict[str, Any]:
    return rows.slice(position, 1).to_pylist()[0]


def _give_up(entry: dict[str, Any], settings: IndexSettings, out: Path) -> str:
    """Quarantine a slide whose reader died before it could write down that it tried."""
    problem = SlideError("reader_crashed", "the processes that were to read it died at once")
    refused(entry, problem, settings.detector, out)
    return entry["slide_id"]


def _unfinished(rows: pa.Table, shared: Shared, out: Path, progress: Progress) -> np.ndarray:
    """Positions of the slides still to be indexed; int64, ascending.

    A new folder has no parts to look at. Else they are opened where the CPUs are, some hundred to a
    task.
    """
    total = rows.num_rows
    parts = part_path(out, "x").parent
    if not parts.is_dir() or not any(os.scandir(parts)):
        return np.arange(total)
    if total <= _LOOKED_AT:
        return _without_part(rows, str(out), 0, total)
    look = ray.remote(num_cpus=0.5)(_without_part_shared)
    starts = deque(range(0, total, _LOOKED_AT))
    at_once = max(2, 4 * int(ray.cluster_resources().get("CPU", 1)))
    running: deque[Any] = deque()
    found = []
    while starts or running:
        while starts and len(running) < at_once:
            low = starts.popleft()
            running.append(look.remote(shared, str(out), low, min(low + _LOOKED_AT, total)))
        found.append(ray.get(running.popleft()))
        looked_at = min(len(found) * _LOOKED_AT, total)
        progress.update("finished before", looked_at, total, "slides looked at")
    return np.concatenate(found)


def _without_part_shared(shared: Shared, out: str, low: int, high: int) -> np.ndarray:
    return _without_part(shared.get(), out, low, high)


def _without_part(rows: pa.Table, out: str, low: int, high: int) -> np.ndarray:
    entries = rows.slice(low, high - low).to_pylist()
    todo = [low + i for i, entry in enumerate(entries) if not is_finished(out, entry)]
    return np.array(todo, np.int64)


def merge_parts(manifest: Manifest, out: Path) -> tuple[pa.Table, pa.Table]:
    """Write `slides.parquet` and `quarantine.parquet` from the parts.

    Labels and splits are taken as the manifest has them now. Both tables are streamed, sorted by
    slide_id, and their bytes depend on the parts and the manifest alone.

    Returns:
        the slide table and the quarantine table, both backed by temporary files.
    """
    schema = slide_schema(manifest.rows.schema, manifest.label_columns)
    with RowSpool(QUARANTINE_SCHEMA) as problems:

        def rows() -> Iterator[dict[str, Any]]:
            for entry, indexed in _parts_in_order(manifest.rows, out):
                assert indexed is not None, f"no part for {entry['slide_id']}"
                for problem in indexed.quarantine:
                    problems.add(problem)
                yield indexed.row | {k: v for k, v in entry.items() if k not in ("mpp", "z")}

        slides = write_slide_table(rows(), out / "slides.parquet", schema)
        quarantine = problems.table()
    write_parquet_batches(quarantine, out / "quarantine.parquet")
    return slides, quarantine


def _parts_in_order(
    rows: pa.Table, out: Path
) -> Iterator[tuple[dict[str, Any], IndexedSlide | None]]:
    """Every slide of the manifest, by slide_id, with what its part holds."""

    def read(entry: dict[str, Any]) -> IndexedSlide | None:
        return read_indexed(part_path(out, entry["slide_id"]))

    order = pc.sort_indices(rows["slide_id"]).to_numpy().astype(np.int64)
    with ThreadPoolExecutor(_OPEN_PARTS) as threads:
        for batch in iter_taken(rows, order, _LOOKED_AT):
            entries = batch.to_pylist()
            yield from zip(entries, threads.map(read, entries), strict=True)
