from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import psutil
import pyarrow as pa
import pytest

from cytoray.errors import SlideError
from cytoray.slides import parse_tile_id
from cytoray.streaming.plan import ReadPlan
from cytoray.streaming.tile_pixels import BagTiles, ChunkTiles, KeptTiles, OpenSlides
from cytoray.synthetic import corrupt_tile

from ..conftest import TILE_PX


def with_path(plan: ReadPlan, slide: int, path: Path | str) -> ReadPlan:
    """The plan with another file for one slide."""
    paths = plan.slides.column("path").to_pylist()
    paths[slide] = str(path)
    place = plan.slides.column_names.index("path")
    return replace(plan, slides=plan.slides.set_column(place, "path", pa.array(paths)))


def all_tiles(plan: ReadPlan) -> dict[str, np.ndarray]:
    reader = ChunkTiles(plan)
    chunks = [reader.read(i) for i in range(plan.num_chunks)]
    return {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}


def test_all_kept_tiles_with_the_slides_own_pixels(read_plan, plan_tile_ids) -> None:
    """OpenSlide itself is the reference: at the slides' own mpp nothing is resampled."""
    tiles = all_tiles(read_plan)
    assert sorted(tiles["tile_id"].tolist()) == plan_tile_ids
    assert set(tiles["error"].tolist()) == {""}
    paths = read_plan.slides.column("path").to_pylist()
    handles = [openslide.OpenSlide(path) for path in paths]
    ids = read_plan.slides.column("slide_id").to_pylist()
    for i in range(0, len(tiles["tile_id"]), 17):
        slide_id, _, column, row, index = parse_tile_id(tiles["tile_id"][i])
        x = (column * 8 + index % 8) * TILE_PX
        y = (row * 8 + index // 8) * TILE_PX
        slide = tiles["slide"][i]
        assert ids[slide] == slide_id
        assert tiles["corner_level0"][i].tolist() == [x, y]
        theirs = np.asarray(handles[slide].read_region((x, y), 0, (TILE_PX, TILE_PX)))[..., :3]
        assert np.array_equal(tiles["pixels"][i], theirs)


def test_a_part_of_the_chunks(read_plan) -> None:
    part = replace(read_plan, chunk_numbers=np.array([4, 1]))
    for position, chunk in enumerate((4, 1)):
        got, whole = ChunkTiles(part).read(position), ChunkTiles(read_plan).read(chunk)
        assert got["tile_id"].tolist() == whole["tile_id"].tolist()
        assert np.array_equal(got["pixels"], whole["pixels"])


def test_a_slide_that_is_gone_is_reported_on_every_tile(read_plan, tmp_path) -> None:
    tiles = all_tiles(with_path(read_plan, 1, tmp_path / "gone.svs"))
    lost = tiles["slide"] == 1
    assert all("missing_file" in error for error in tiles["error"][lost].tolist())
    assert set(tiles["error"][~lost].tolist()) == {""}
    assert not tiles["pixels"][lost].any()


def test_a_damaged_spot_costs_only_the_tiles_on_it(read_plan, tmp_path) -> None:
    source = Path(read_plan.slides.column("path")[0].as_py())
    damaged = corrupt_tile(source, tmp_path / source.name, 5)  # JPEG tile: column 1, row 1 of 256
    good, bad = all_tiles(read_plan), all_tiles(with_path(read_plan, 0, damaged))
    hit = [
        slide == 0 and 256 <= x < 512 and 256 <= y < 512
        for slide, (x, y) in zip(good["slide"], good["corner_level0"].tolist(), strict=True)
    ]
    assert sum(hit) > 0
    assert (bad["error"] != "").tolist() == hit
    whole = ~np.array(hit)
    assert np.array_equal(bad["pixels"][whole], good["pixels"][whole])


def test_tiles_of_a_bag_by_place(read_plan) -> None:
    tiles = all_tiles(read_plan)
    ids = read_plan.slides.column("slide_id").to_pylist()
    names = {s: tiles["tile_id"][tiles["slide"] == i].tolist() for i, s in enumerate(ids)}
    bags = BagTiles(read_plan, names)
    chosen = np.array([7, 0, 3])
    for i, slide_id in enumerate(ids):
        assert bags.num_tiles(slide_id) == len(names[slide_id])
        pixels = bags(slide_id, chosen, np.random.default_rng(0))
        assert np.array_equal(pixels, tiles["pixels"][tiles["slide"] == i][chosen])


def test_a_bag_tile_that_cannot_be_read_is_an_error(read_plan, tmp_path) -> None:
    slide_id = read_plan.slides.column("slide_id")[0].as_py()
    name = ChunkTiles(read_plan).read(0)["tile_id"][0]
    bags = BagTiles(with_path(read_plan, 0, tmp_path / "gone.svs"), {slide_id: [name]})
    with pytest.raises(SlideError, match="missing_file"):
        bags(slide_id, np.array([0]), np.random.default_rng(0))


def test_few_slides_are_open_at_a_time(read_plan, tmp_path) -> None:
    """A cohort of any size costs four file handles a process."""
    row = read_plan.slides.slice(0, 1).to_pylist()[0]
    rows = []
    for i in range(7):
        path = tmp_path / f"{i}{Path(row['path']).suffix}"
        shutil.copyfile(row["path"], path)
        rows.append(row | {"slide_id": f"s{i}", "path": str(path)})
    plan = replace(read_plan, slides=pa.Table.from_pylist(rows, read_plan.slides.schema))
    slides = OpenSlides(plan)
    first = slides.read(0, (0, 0)).pixels.copy()
    for slide in range(7):
        assert np.array_equal(slides.read(slide, (0, 0)).pixels, first)
    here = [f.path for f in psutil.Process().open_files() if f.path.startswith(str(tmp_path))]
    assert len(set(here)) <= 4
    assert np.array_equal(slides.read(0, (0, 0)).pixels, first)  # opened again


def test_kept_tiles_by_place_are_those_of_the_chunks(read_plan) -> None:
    tiles, source = all_tiles(read_plan), KeptTiles(read_plan)
    ids = read_plan.slides.column("slide_id").to_pylist()
    rng = np.random.default_rng(0)
    for slide, slide_id in enumerate(ids):
        pixels = tiles["pixels"][tiles["slide"] == slide]
        assert source.num_tiles(slide_id) == len(pixels)
        places = np.array([0, len(pixels) - 1, *rng.integers(len(pixels), size=5)])
        assert np.array_equal(source(slide_id, places, rng), pixels[places])
