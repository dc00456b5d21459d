"""Tiles from slides through Ray Data, end to end on all cores: ours against ratiopath.

    python -m benchmarks.tiles_ray --slides DIR [--tile-px 256] [--rounds 1] [--max-slides 33]
        [--repeat 4]

Both read every tile of the finest level of the same slides into blocks that the driver iterates
over, in turn; starting the actors or tasks counts, starting Ray and the helper actors of Ray Data
does not. With --repeat N each slide stands N times in both lists, as that many slides: a cohort is
larger than what a start weighs. ratiopath (1.0.3) is compared where it is installed:
`python -m venv DIR && DIR/bin/pip install -e . ratiopath==1.0.3`.
The last line is JSON: tiles_per_s; vs_ratiopath, the median ratio of the rounds (above 1, ours is
faster), null where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from cytoray.distributed.cluster import Shared, connect
from cytoray.distributed.tile_source import ReadChunks, chunk_dataset, unpack_chunk
from cytoray.errors import SlideError
from cytoray.slides import Grid, ResolvedMpp, SlideGrid, open_slide
from cytoray.streaming.plan import ReadPlan, make_plan

try:
    from ratiopath.ray import read_slides  # pyright: ignore[reportMissingImports]
    from ratiopath.tiling import (  # pyright: ignore[reportMissingImports]
        grid_tiles,
        read_slide_tiles,
    )
except ImportError:
    read_slides = None


def find_slides(folder: Path, tile_px: int, most: int, repeat: int = 1) -> pa.Table:
    """Rows as a slide table has them, every tile kept; mpp 1 stands for the slide's own scale."""
    rows = []
    for path in sorted(folder.iterdir()):
        try:
            with open_slide(str(path)) as slide:
                info = slide.info
        except SlideError:
            continue
        scale = ResolvedMpp(mpp_x=1.0, mpp_y=1.0, source="manifest")
        grid = Grid(tile_px=tile_px, mpp=1.0)
        layout = SlideGrid.of(grid, info.width_px_level0, info.height_px_level0, scale)
        rows.append(
            {
                "slide_id": path.stem,
                "path": str(path),
                "mpp_x": 1.0,
                "mpp_y": 1.0,
                "mpp_source": scale.source,
                "reader": info.reader,
                "width_px_level0": info.width_px_level0,
                "height_px_level0": info.height_px_level0,
                "status": "ok",
                "keep_masks": [layout.valid_mask(*place) for place in layout.chunks()],
            }
        )
        if len(rows) == most:
            break
    rows = [row | {"slide_id": f"{row['slide_id']}-{i}"} for i in range(repeat) for row in rows]
    masks = pa.array([row.pop("keep_masks") for row in rows], pa.list_(pa.uint64()))
    return pa.Table.from_pylist(rows).append_column("keep_masks", masks)


def read_ours(plan: ReadPlan, cpus: int) -> Iterator[int]:
    """Tiles of each block, through the stages that embedding reads with."""
    dataset = chunk_dataset(
        ReadChunks,
        (Shared(plan),),
        start=0,
        stop=plan.num_chunks,
        cpus_per_reader=(cpus - 0.1) / cpus,
        max_readers=cpus,
    )
    tables: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    for table in tables:
        for i in range(table.num_rows):
            pixels = unpack_chunk(table.slice(i, 1))["pixels"]
            assert pixels.dtype == np.uint8
            yield len(pixels)


def read_ratiopath(paths: list[str], tile_px: int) -> Iterator[int]:
    """The pipeline of its documentation: slides, their grid, tiles read in batches."""
    assert read_slides is not None
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    context.target_max_block_size = 128 << 20

    def tiling(row: dict[str, Any]) -> list[dict[str, Any]]:
        size = (row["extent_x"], row["extent_y"])
        extent, stride = (
            np.array((row[f"{name}_x"], row[f"{name}_y"])) for name in ("tile_extent", "stride")
        )
        return [
            {
                "tile_x": int(x),
                "tile_y": int(y),
                "path": row["path"],
                "level": row["level"],
                "tile_extent_x": row["tile_extent_x"],
                "tile_extent_y": row["tile_extent_y"],
            }
            for x, y in grid_tiles(
                slide_extent=size, tile_extent=extent, stride=stride, last="drop"
            )
        ]

    slides = read_slides(paths, level=0, tile_extent=tile_px, stride=tile_px)
    tiles = slides.flat_map(tiling).repartition(target_num_rows_per_block=128)
    tiles = tiles.map_batches(read_slide_tiles, batch_size=64)
    batches: Any = tiles.iter_batches(batch_size=None)
    for batch in batches:
        yield len(batch["tile"])


def main() -> None:
    """Measure, print a table, and a line of JSON."""
    parser = argparse.ArgumentParser(description="Tiles through Ray Data, side by side.")
    parser.add_argument("--slides", type=Path, required=True, help="folder of slides")
    parser.add_argument("--tile-px", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-slides", type=int, default=33)
    parser.add_argument("--repeat", type=int, default=4, help="times that each slide is listed")
    options = parser.parse_args()
    if not options.slides.is_dir():
        parser.exit(2, f"{options.slides} is not a folder\n")
    table = find_slides(options.slides, options.tile_px, options.max_slides, options.repeat)
    plan = make_plan(table, tile_px=options.tile_px, mpp=1.0)
    connect()
    cpus = int(ray.cluster_resources()["CPU"])
    ray.data.range(1).materialize()  # starts the helper actors of Ray Data
    ways: dict[str, Callable[[], Iterator[int]]] = {"ours": lambda: read_ours(plan, cpus)}
    if read_slides is not None:
        paths = table["path"].to_pylist()
        ways["ratiopath"] = lambda: read_ratiopath(paths, options.tile_px)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, read in ways.items():
            began = time.perf_counter()
            tiles = sum(read())
            assert tiles == plan.num_tiles, f"{name} read {tiles} of {plan.num_tiles} tiles"
            speeds[name].append(tiles / (time.perf_counter() - began))
    print(f"{table.num_rows} slides, {plan.num_tiles} tiles, {os.cpu_count()} cores")
    for name, values in speeds.items():
        print(f"{name:12s} {np.median(values):8.0f} tiles/s")
    ratio = None
    if "ratiopath" in speeds:
        ratio = round(float(np.median(np.divide(speeds["ours"], speeds["ratiopath"]))), 2)
    print(json.dumps({"tiles_per_s": round(np.median(speeds["ours"])), "vs_ratiopath": ratio}))


if __name__ == "__main__":
    main()
