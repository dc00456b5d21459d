"""Memory of planning 10,000, 100,000 and 1,000,000 slides: the driver's and a reading worker's.

    python -m benchmarks.plan_memory [--slides 10000 100000 1000000] [--chunks 24] [--folder DIR]

No pixels and no Ray: manifests and slide tables are made up, then read as the jobs read them, each
in a process of its own. The driver reads the manifest, merges rows as they come from finished
slides into slides.parquet and quarantine.parquet, plans the reading from that table, and hands the
plan over as an object store would (pickled out of band into a shared map). The worker opens that
map, asks for tiles of chunks in reading order, and reads their slides' rows.

`rss` is the peak of all resident memory, `anon` that of private memory alone: pages of mapped files
are part of the first and are taken back by the kernel when memory is short. The last line is JSON:
rss_mb_<size>, anon_mb_<size> (driver), worker_rss_mb_<size>, worker_anon_mb_<size>, seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import multiprocessing
import pickle
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_KEYS = {"rss": "VmRSS", "anon": "RssAnon"}
_POSITIONS = 20_000


def memory_mb() -> dict[str, float]:
    """Resident and private memory of this process."""
    text = Path("/proc/self/status").read_text()
    found = {name: re.search(rf"{key}:\s+(\d+)", text) for name, key in _KEYS.items()}
    return {name: int(match[1]) / 1024 for name, match in found.items() if match}


class Peak:
    """The largest `memory_mb` while a block runs, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.mb = memory_mb()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            now = memory_mb()
            self.mb = {name: max(value, now[name]) for name, value in self.mb.items()}

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def write_manifest(path: Path, count: int) -> None:
    """A CSV as users have it, three slides a patient."""
    with path.open("w") as file:
        file.write("slide_id,path,patient_id,site,mpp,split,label\n")
        for i in range(count):
            split = "train" if i // 3 % 5 else "test"
            file.write(
                f"slide_{i:07d},s3://bucket/site_{i % 40}/2024/slide_{i:07d}.svs,"
                f"patient_{i // 3:07d},site_{i % 40},0.25,{split},{i % 2}\n"
            )


def finished_slides(manifest: Any, chunks: int) -> Iterator[dict[str, Any]]:
    """Rows as finished parts give them; one slide in fifty is quarantined."""
    masks = np.random.default_rng(0).integers(0, 2**63, chunks).astype(np.uint64)
    masks[::3] = 0
    for i, entry in enumerate(manifest.iter_rows()):
        row = {k: v for k, v in entry.items() if k not in ("mpp", "z")}
        if i % 50 == 0:
            yield row | {"status": "empty_file"}
            continue
        yield row | {
            "status": "ok", "width_px_level0": 50_000, "height_px_level0": 40_000,
            "vendor": "aperio", "num_levels": 3, "level_downsamples": [1.0, 4.0, 16.0],
            "mpp_x": 0.25, "mpp_y": 0.25, "mpp_source": "file", "reader": "tiff",
            "reader_reason": "tiled JPEG; pixels compared with OpenSlide's",
            "foreground_share": 0.3, "grid_mpp": 0.5, "grid_tile_px": 224, "chunk_columns": 6,
            "chunk_rows": chunks // 6, "keep_masks": masks, "num_tiles": 500, "num_nuclei": 9000,
            "file_size_bytes": 10**9, "file_mtime_ns": 10**18,
        }  # fmt: skip


def drive(folder: Path, count: int, chunks: int) -> dict[str, float]:
    """The driver's part; leaves the plan in `folder`."""
    from cytoray.slides import quarantine_row, read_manifest, slide_schema, write_slide_table
    from cytoray.slides.quarantine import QUARANTINE_SCHEMA
    from cytoray.spool import RowSpool, write_parquet_batches
    from cytoray.streaming.plan import plan_of_index

    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - began
        return result

    with Peak() as peak:
        manifest = timed("manifest_s", lambda: read_manifest(folder / "manifest.csv"))
        schema = slide_schema(manifest.rows.schema, manifest.label_columns)
        with RowSpool(QUARANTINE_SCHEMA) as problems:

            def rows() -> Iterator[dict[str, Any]]:
                for row in finished_slides(manifest, chunks):
                    if row["status"] != "ok":
                        fault = (row["path"], "index", row["status"], "it has zero bytes")
                        problems.add(quarantine_row(row["slide_id"], *fault))
                    yield row

            timed("merge_s", lambda: write_slide_table(rows(), folder / "slides.parquet", schema))
            write_parquet_batches(problems.table(), folder / "quarantine.parquet")
        plan = timed("plan_s", lambda: plan_of_index(folder))
        timed("hand_over_s", lambda: hand_over(plan, folder))
    return peak.mb | seconds | {"chunks": plan.num_chunks}


def hand_over(plan: Any, folder: Path) -> None:
    """Pickle with the arrays out of band, straight into a file, as into an object store."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(plan, protocol=5, buffer_callback=buffers.append)
    places = [len(buffer.raw()) for buffer in buffers]
    with (folder / "plan.bin").open("wb") as file:
        for buffer in buffers:
            file.write(buffer.raw())
    (folder / "plan.head").write_bytes(pickle.dumps((head, places)))


def work(folder: Path, count: int, chunks: int) -> dict[str, float]:
    """A reader's part: the shared plan, and rows and tiles of chunks all over it."""
    from cytoray.slides import mask_indices
    from cytoray.streaming import ChunkOrder
    from cytoray.streaming.tile_pixels import OpenSlides

    with Peak() as peak, (folder / "plan.bin").open("rb") as file:
        began = time.perf_counter()
        shared = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        head, places = pickle.loads((folder / "plan.head").read_bytes())
        ends = np.cumsum([0, *places]).tolist()
        views = [shared[low:high] for low, high in itertools.pairwise(ends)]
        plan = pickle.loads(head, buffers=views)
        order, slides = ChunkOrder(num_chunks=plan.num_chunks, seed=0), OpenSlides(plan)
        tiles = 0
        for position in range(_POSITIONS):
            chunk = order.chunks(np.array([position]))[1]
            slides.row(int(plan.slide_of(chunk)[0]))
            tiles += len(mask_indices(int(plan.keep_mask[int(chunk[0])])))
        spent = time.perf_counter() - began
    assert tiles
    return peak.mb | {"read_s": spent}


def in_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Run in a fresh process, so that no memory of an earlier size is left over."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def size_name(count: int) -> str:
    """10k, 100k, 1m."""
    return f"{count // 1_000_000}m" if count >= 1_000_000 else f"{count // 1000}k"


def main() -> None:
    """Measure every size and print the curve."""
    parser = argparse.ArgumentParser(description="Memory of planning many slides.")
    parser.add_argument("--slides", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--chunks", type=int, default=24, help="chunks of a slide")
    parser.add_argument("--folder", default=None, help="where the tables lie for the while")
    options = parser.parse_args()
    result: dict[str, float] = {}
    began = time.perf_counter()
    for count in options.slides:
        name = size_name(count)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            arguments = (Path(folder), count, options.chunks)
            write_manifest(Path(folder) / "manifest.csv", count)
            driver = in_process(drive, *arguments)
            worker = in_process(work, *arguments)
        print(
            f"{count:>9,} slides, {driver['chunks']:>11,.0f} chunks: driver {driver['rss']:5.0f} "
            f"MB resident, {driver['anon']:4.0f} private; worker {worker['rss']:5.0f} MB, "
            f"{worker['anon']:4.0f}; manifest {driver['manifest_s']:.1f} s, merge "
            f"{driver['merge_s']:.1f} s, plan {driver['plan_s']:.1f} s, hand over "
            f"{driver['hand_over_s']:.1f} s, {_POSITIONS / worker['read_s']:,.0f} chunks/s found",
            flush=True,
        )
        for kind, measured in (("", driver), ("worker_", worker)):
            for key in _KEYS:
                result[f"{kind}{key}_mb_{name}"] = round(measured[key], 1)
    result["seconds"] = round(time.perf_counter() - began, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
