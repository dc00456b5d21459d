from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from rich.console import Console

from cytoray.distributed import index as index_module
from cytoray.distributed.cluster import Shared
from cytoray.distributed.index import index_slides, merge_parts
from cytoray.errors import SlideError
from cytoray.indexing import IndexSettings, part_path, refused
from cytoray.progress import Progress
from cytoray.slides import Grid, read_manifest

from ..conftest import MPP, TILE_PX

SETTINGS = IndexSettings(grid=Grid(tile_px=TILE_PX, mpp=MPP))


@dataclass
class DeadlyDetector:
    """Kills its process on the slide whose id stands in a file, as a native library would."""

    name: str = "classical"

    def __call__(self, pixels: np.ndarray, mpp: float) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def write_manifest(folder: Path, ids: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [
        "slide_id,path,grade,split",
        *(f"{s},s3://b/{s}.svs,{int(s[1:]) % 3},train" for s in ids),
    ]
    path = folder / "manifest.csv"
    path.write_text("\n".join(lines))
    return path


def test_tables_depend_on_the_parts_not_on_the_order_of_slides(tmp_path) -> None:
    ids = [f"s{i:04d}" for i in range(1200)]
    out = tmp_path / "out"
    manifest = read_manifest(write_manifest(tmp_path / "a", ids))
    for entry in manifest.iter_rows():
        number = int(entry["slide_id"][1:])
        refused(entry, SlideError(f"code_{number % 2}", "x" * (number % 7)), "classical", out)
    slides, quarantine = merge_parts(manifest, out)
    assert slides["slide_id"].to_pylist() == quarantine["slide_id"].to_pylist() == ids
    assert slides["status"].to_pylist() == [f"code_{i % 2}" for i in range(1200)]
    assert slides["grade"].to_pylist() == [i % 3 for i in range(1200)]
    files = {name: (out / f"{name}.parquet").read_bytes() for name in ("slides", "quarantine")}
    random.Random(0).shuffle(ids)
    merge_parts(read_manifest(write_manifest(tmp_path / "b", ids)), out)
    for name, data in files.items():
        assert (out / f"{name}.parquet").read_bytes() == data


@pytest.mark.ray
def test_finished_parts_are_looked_at_by_tasks_and_told_apart(
    ray_cluster, indexed, manifest, monkeypatch
) -> None:
    rows = read_manifest(manifest).rows
    before = {p.name: p.stat().st_mtime_ns for p in (indexed.out / "nuclei").iterdir()}
    monkeypatch.setattr(index_module, "_LOOKED_AT", 3)
    text = StringIO()
    with Progress("x", Console(file=text)) as progress:
        assert index_slides(rows, SETTINGS, indexed.out, progress=progress) == []
    assert "finished before: 8/8 slides looked at" in text.getvalue()
    last = text.getvalue().splitlines()[-2]
    assert "slides: 8/8 slides (100 %)" in last
    assert "8 of them before" in last
    assert {p.name: p.stat().st_mtime_ns for p in (indexed.out / "nuclei").iterdir()} == before
    some = pa.concat_tables([rows.slice(0, 2), rows.slice(5, 1)])
    todo = index_module._unfinished(rows, Shared(rows), indexed.out / "none", progress)
    assert todo.tolist() == list(range(8))
    moved = some.set_column(1, "path", pa.array(["/gone", *some["path"].to_pylist()[1:]]))
    todo = index_module._unfinished(moved, Shared(moved), indexed.out, progress)
    assert todo.tolist() == [0]


class DeadlyIndex(index_module.IndexSlides):
    """Dies in the detector on one slide, and notes every process that was started."""

    def __init__(self, manifest: Shared, todo, settings: IndexSettings, out: str) -> None:
        super().__init__(manifest, todo, settings, out)
        Path(out, f"started-{os.getpid()}").touch()
        self.detect = self.indexer.detect

    def __call__(self, batch):
        [place] = batch["position"].tolist()
        deadly = self.rows["slide_id"][int(self.todo[place])].as_py() == "synth_0001"
        self.indexer.detect = DeadlyDetector() if deadly else self.detect
        yield from super().__call__(batch)


@pytest.mark.ray
def test_a_detector_that_kills_its_process_costs_its_slide_and_two_actors(
    ray_cluster, manifest, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(index_module, "IndexSlides", DeadlyIndex)
    checked = read_manifest(manifest)
    rows = checked.rows.slice(0, 4)
    tmp_path.joinpath("o").mkdir()
    with Progress("x", Console(file=StringIO())) as progress:
        lost = index_slides(rows, SETTINGS, tmp_path / "o", progress=progress, max_actors=1)
    assert lost == []  # the third process found that the tries were used up, and said so
    assert len(list((tmp_path / "o").glob("started-*"))) == 3  # one, and one for each death
    assert all(part_path(tmp_path / "o", s).exists() for s in rows["slide_id"].to_pylist())
    slides, quarantine = merge_parts(
        type(checked)(checked.path, rows, checked.label_columns), tmp_path / "o"
    )
    assert slides["status"].to_pylist() == ["ok", "reader_crashed", "ok", "ok"]
    assert quarantine["message"].to_pylist() == ["the process reading it died 2 times"]
    assert ray.is_initialized()
