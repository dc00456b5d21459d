"""Reading tiles from slides, side by side on one core.

    python -m benchmarks.tiles --slides DIR [--tile-px 224] [--rounds 3] [--max-slides 4]

Slides are opened beforehand; every round reads the same tiles by each way in turn, and each ratio
is the median over the rounds (above 1, ours is faster). The last line is JSON:
vs_openslide: chunks of 8×8 tiles cut by the reader ladder, against an OpenSlide call per tile;
vs_openslide_unaligned: the same at 1.1 times the finest um/px, where both must resample;
vs_openslide_elsewhere: the same, aligned, on slides the fast reader refuses (the pixels of the
first ones in Deflate and LZW tiles), which both read through OpenSlide; the lesser of the two;
of_decode_limit: share of the speed at which libjpeg decodes the bare JPEG tiles of level 0;
vs_ratiopath: against ratiopath's tile reader, null where it is not installed;
pixels_equal: whether every aligned tile has OpenSlide's pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import openslide
import tifffile

from cytoray.errors import InputError, SlideError
from cytoray.slides.chunks import Grid, SlideGrid, mask_indices, read_chunk
from cytoray.slides.jpeg_tiles import tile_decoder
from cytoray.slides.mpp import ResolvedMpp
from cytoray.slides.reader import open_slide
from cytoray.slides.readers_tiff import TiffReader

try:
    from ratiopath.tiling import (  # pyright: ignore[reportMissingImports]
        read_slide_tiles as ratiopath_read,
    )
except ImportError:
    ratiopath_read = None

# At least the whole slide must be read once for a figure; above this it is cut short.
MAX_CHUNKS_PER_SLIDE = 9
UNALIGNED = 1.1
# Of a TIFF's tiles: OpenSlide reads them, the fast reader is for JPEG.
ELSEWHERE = ("adobe_deflate", "lzw")
# A way of reading: yields tiles one after another, and keeps none.
Way = Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Subject:
    """One slide with the chunks to read; mpp 1 stands for the slide's own scale."""

    path: str
    aligned: SlideGrid
    unaligned: SlideGrid


UNIT_MPP = ResolvedMpp(mpp_x=1.0, mpp_y=1.0, source="manifest")


def find_subjects(folder: Path, tile_px: int, max_slides: int) -> list[Subject]:
    """Slides of a folder that the fast reader serves, in alternating formats."""
    subjects = []
    for path in sorted(folder.iterdir()):
        try:
            with open_slide(str(path), reader="tiff") as slide:
                size = slide.info.level_dimensions[0]
            grids = [
                SlideGrid.of(Grid(tile_px=tile_px, mpp=mpp), *size, UNIT_MPP)
                for mpp in (1.0, UNALIGNED)
            ]
        except SlideError:
            continue
        subjects.append(Subject(str(path), *grids))
        if len(subjects) == max_slides:
            break
    if not subjects:
        raise InputError(f"no tiled JPEG slide in {folder}")
    return subjects


def write_elsewhere(subjects: list[Subject], folder: Path) -> dict[str, Subject]:
    """The pixels of the first slides in tiles that the fast reader refuses, by compression."""
    made = {}
    for compression, subject in zip(ELSEWHERE, subjects, strict=False):
        path = folder / f"{compression}.tiff"
        with open_slide(subject.path) as slide:
            pixels = slide.read_level(0, 0, 0, *slide.info.level_dimensions[0])
        tifffile.imwrite(path, pixels, tile=(256, 256), compression=compression, photometric="rgb")
        with open_slide(str(path)) as slide:
            assert slide.info.reader == "openslide", slide.info.reader
        made[compression] = replace(subject, path=str(path))
    return made


def chunks_of(layout: SlideGrid) -> list[tuple[int, int]]:
    """The chunks to read, row by row."""
    return list(layout.chunks())[:MAX_CHUNKS_PER_SLIDE]


def tiles_of(layout: SlideGrid) -> Iterator[tuple[int, int]]:
    """(x, y) in target pixels of every tile of the chunks to read."""
    for column, row in chunks_of(layout):
        for index in mask_indices(layout.valid_mask(column, row)):
            x, y, _, _ = layout.tile_rect_px(column, row, int(index))
            yield x, y


def read_ours(path: str, layout: SlideGrid) -> Way:
    """Chunks through the reader ladder, cut into tiles of their own memory."""
    slide = open_slide(path)

    def read() -> Iterator[np.ndarray]:
        for column, row in chunks_of(layout):
            chunk = read_chunk(slide, UNIT_MPP, layout.grid, column, row)
            yield from chunk.tiles(mask_indices(layout.valid_mask(column, row)))
        if isinstance(slide, TiffReader):
            slide.clear_cache()
        else:
            slide.limit_cache(256 << 20)  # a new and empty one

    return read


def read_openslide(path: str, layout: SlideGrid) -> Way:
    """One OpenSlide call per tile, resized with OpenCV where the scale is not 1."""
    slide = openslide.OpenSlide(path)
    side, scale = layout.grid.tile_px, layout.scale_x
    source_px = round(side * scale)

    def read() -> Iterator[np.ndarray]:
        slide.set_cache(openslide.OpenSlideCache(256 << 20))
        for x, y in tiles_of(layout):
            corner = (round(x * scale), round(y * scale))
            region = slide.read_region(corner, 0, (source_px, source_px)).convert("RGB")
            tile = np.asarray(region)
            if source_px != side:
                tile = cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA)
            yield tile

    return read


def read_ratiopath(path: str, layout: SlideGrid) -> Way:
    """ratiopath's own tile reader, 64 tiles a batch as one of its Ray tasks would get."""
    corners = list(tiles_of(layout))
    side = layout.grid.tile_px

    def read() -> Iterator[np.ndarray]:
        assert ratiopath_read is not None
        for start in range(0, len(corners), 64):
            part = corners[start : start + 64]
            batch = {
                "path": [path] * len(part),
                "tile_x": [x for x, _ in part],
                "tile_y": [y for _, y in part],
                "level": [0] * len(part),
                "tile_extent_x": [side] * len(part),
                "tile_extent_y": [side] * len(part),
            }
            yield from ratiopath_read(batch)["tile"]

    return read


def decode_limit(path: str, layout: SlideGrid) -> Way:
    """Decode the JPEG tiles under the chunks into one buffer, from memory."""
    with open_slide(path, reader="tiff") as slide:
        assert isinstance(slide, TiffReader)
        level = slide.levels[0]
        needed = set()
        for x, y in tiles_of(layout):
            side = layout.grid.tile_px
            for row in range(y // level.tile_height, (y + side - 1) // level.tile_height + 1):
                for column in range(x // level.tile_width, (x + side - 1) // level.tile_width + 1):
                    needed.add(row * level.columns + column)
        streams = [slide.tile_stream(0, index) for index in sorted(needed)]
    decode = tile_decoder()
    buffer = np.empty((level.tile_height, level.tile_width, 3), np.uint8)

    def read() -> Iterator[np.ndarray]:
        for stream in streams:
            decode(stream, level.tables, level.is_ycbcr, buffer)
            yield buffer

    return read


def measure(ways: dict[str, list[Way]], rounds: int) -> dict:
    """Seconds of every way in every round, ways interleaved: name to (rounds,)."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, readers in ways.items():
            started = time.perf_counter()
            for read in readers:
                deque(read(), maxlen=0)
            if number:  # the first round warms the file cache
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def main() -> None:
    """Measure, print a table, and a line of JSON."""
    parser = argparse.ArgumentParser(description="Reading tiles, side by side.")
    parser.add_argument("--slides", type=Path, required=True, help="folder of tiled JPEG slides")
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-slides", type=int, default=4)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    try:
        subjects = find_subjects(options.slides, options.tile_px, options.max_slides)
    except (InputError, OSError) as error:
        parser.exit(2, f"{error}\n")
    equal = all(
        np.array_equal(ours, theirs)
        for s in subjects
        for ours, theirs in zip(
            read_ours(s.path, s.aligned)(), read_openslide(s.path, s.aligned)(), strict=True
        )
    )
    ways = {
        "ours": [read_ours(s.path, s.aligned) for s in subjects],
        "openslide": [read_openslide(s.path, s.aligned) for s in subjects],
        "ours, unaligned": [read_ours(s.path, s.unaligned) for s in subjects],
        "openslide, unaligned": [read_openslide(s.path, s.unaligned) for s in subjects],
        "decode limit": [decode_limit(s.path, s.aligned) for s in subjects],
    }
    if ratiopath_read is not None:
        ways["ratiopath"] = [read_ratiopath(s.path, s.aligned) for s in subjects]
    tiles = {
        name: sum(
            1 for s in subjects for _ in tiles_of(s.unaligned if "unal" in name else s.aligned)
        )
        for name in ways
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, made in write_elsewhere(subjects, Path(folder)).items():
            ways[f"ours, {name}"] = [read_ours(made.path, made.aligned)]
            ways[f"openslide, {name}"] = [read_openslide(made.path, made.aligned)]
            count = sum(1 for _ in tiles_of(made.aligned))
            tiles |= {f"ours, {name}": count, f"openslide, {name}": count}
        seconds = measure(ways, options.rounds)
    print(f"{len(subjects)} slides, {tiles['ours']} tiles, {os.cpu_count()} cores (one used)")
    report(tiles, seconds, equal)


def report(tiles: dict[str, int], seconds: dict[str, np.ndarray], equal: bool) -> None:
    """Print tiles per second of each way, then the ratios as JSON."""
    for name, values in seconds.items():
        print(f"{name:24s} {tiles[name] / np.median(values):8.0f} tiles/s")

    def ratio(slow: str, fast: str) -> float:
        return round(float(np.median(seconds[slow] / seconds[fast])), 3)

    result = {
        "vs_openslide": ratio("openslide", "ours"),
        "vs_openslide_unaligned": ratio("openslide, unaligned", "ours, unaligned"),
        "vs_openslide_elsewhere": min(
            ratio(f"openslide, {name}", f"ours, {name}")
            for name in ELSEWHERE
            if f"ours, {name}" in seconds
        ),
        "of_decode_limit": ratio("decode limit", "ours"),
        "vs_ratiopath": ratio("ratiopath", "ours") if "ratiopath" in seconds else None,
        "pixels_equal": bool(equal),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
