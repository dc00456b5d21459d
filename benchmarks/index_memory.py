"""Memory of indexing 4, 16 and 64 slides: of each actor, of the driver, and in the object store.

    python -m benchmarks.index_memory [--slides 4 16 64] [--size-px 3072] [--cpus 2]

One generated slide stands under many names (hard links), and `cytoray index`'s own functions index
it as often, each number of slides in a process and a Ray of its own. What is looked at every 20 ms:
resident and private memory of every indexing actor and of the driver, and the bytes in use in the
object store. The last line is JSON: actor_rss_mb_<n>, actor_anon_mb_<n> (the largest actor),
driver_anon_mb_<n>, store_mb_<n>, flat (private memory of the largest actor, most slides over
fewest), seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

_LOOK_EVERY_S = 0.02


class Watch:
    """Peaks of memory, in MB, of this process's indexing actors, of itself and of the store."""

    def __init__(self) -> None:
        self.peak: dict[str, float] = {}
        self.actors: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        import ray

        me = psutil.Process()
        while not self._stop.wait(_LOOK_EVERY_S):
            self._note("driver", me)
            for process in me.children(recursive=True):
                try:
                    if "IndexSlides" in " ".join(process.cmdline()):
                        self.actors.add(process.pid)
                        self._note("actor", process)
                except psutil.Error:
                    continue
            there = ray.cluster_resources().get("object_store_memory", 0.0)
            free = ray.available_resources().get("object_store_memory", there)
            self._keep("store", there - free)

    def _note(self, name: str, process: psutil.Process) -> None:
        memory = process.memory_info()
        self._keep(f"{name}_rss", memory.rss)
        status = Path(f"/proc/{process.pid}/status").read_text()
        private = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
        self._keep(f"{name}_anon", 1024 * float(private.split()[1]))

    def _keep(self, name: str, value: float) -> None:
        self.peak[name] = max(self.peak.get(name, 0.0), value / 1e6)


def index(folder: Path, slide: Path, count: int, cpus: int) -> dict[str, float]:
    """Index `count` names of one slide and return the peaks."""
    import ray

    from cytoray.distributed.cluster import connect
    from cytoray.distributed.index import index_slides, merge_parts
    from cytoray.indexing import IndexSettings
    from cytoray.progress import Progress
    from cytoray.slides import Grid, read_manifest

    lines = ["slide_id,path"]
    for i in range(count):
        name = f"slide_{i:03d}{slide.suffix}"
        os.link(slide, folder / name)
        lines.append(f"slide_{i:03d},{name}")
    (folder / "manifest.csv").write_text("\n".join(lines))
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="cr")  # short: names of Unix sockets
    connect(num_cpus=cpus)
    manifest = read_manifest(folder / "manifest.csv")
    began = time.perf_counter()
    with Watch() as watch, Progress(f"{count} slides") as progress:
        lost = index_slides(
            manifest.rows, IndexSettings(grid=Grid()), folder / "out", progress=progress
        )
        slides, _ = merge_parts(manifest, folder / "out")
    spent = time.perf_counter() - began
    assert not lost
    assert set(slides["status"].to_pylist()) == {"ok"}
    ray.shutdown()
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
    return watch.peak | {"actors": len(watch.actors), "seconds": spent}


def generate(folder: Path, size_px: int) -> Path:
    """One slide of the size asked for."""
    from cytoray.slides import read_manifest
    from cytoray.synthetic import SynthConfig, synthesize

    config = SynthConfig(num_slides=1, held_out=0, size_px=size_px, mpp=0.5)
    return Path(read_manifest(synthesize(config, folder)).rows["path"][0].as_py())


def in_process(function: Any, *arguments: Any) -> Any:
    """Run in a fresh process, so that no memory of an earlier number is left over."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Measure every number of slides and print the curve."""
    parser = argparse.ArgumentParser(description="Memory of indexing many slides.")
    parser.add_argument("--slides", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--size-px", type=int, default=3072)
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args()
    result: dict[str, float] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        slide = in_process(generate, Path(folder) / "made", options.size_px)
        for count in options.slides:
            here = Path(folder) / str(count)
            here.mkdir()
            peak = in_process(index, here, slide, count, options.cpus)
            print(
                f"{count:3d} slides, {peak['actors']:.0f} actors: largest {peak['actor_rss']:.0f} "
                f"MB resident, {peak['actor_anon']:.0f} private; driver {peak['driver_anon']:.0f} "
                f"private; store {peak['store']:.2f} MB; {peak['seconds']:.0f} s",
                flush=True,
            )
            for name in ("actor_rss", "actor_anon", "driver_anon", "store"):
                result[f"{name}_mb_{count}"] = round(peak[name], 2)
    fewest, most = min(options.slides), max(options.slides)
    flat = result[f"actor_anon_mb_{most}"] / result[f"actor_anon_mb_{fewest}"]
    print(
        json.dumps(result | {"flat": round(flat, 3), "seconds": round(time.perf_counter() - began)})
    )


if __name__ == "__main__":
    main()
