from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from cytoray.indexing import part_path
from cytoray.slides import read_quarantine, read_slide_table
from cytoray.synthetic import (
    anucleate_slide,
    blank_slide,
    corrupt_tile,
    not_a_slide,
    strip_mpp,
    truncate,
    zero_bytes,
)

from ..conftest import MPP, TILE_PX

pytestmark = pytest.mark.ray

FLAGS = ["--tile-px", TILE_PX, "--mpp", MPP]
CODES = {
    "empty": ("empty_file",),
    "half": ("truncated", "not_a_slide", "decode_error"),
    "text": ("not_a_slide",),
    "no_scale": ("mpp_missing",),
    "glass": ("no_foreground",),
    "no_nuclei": ("no_nuclei",),
    "gone": ("missing_file",),
}


def tables(out: Path) -> tuple[dict[str, dict], list[dict]]:
    """Rows of the slide table by id, and of the quarantine."""
    slides = read_slide_table(out / "slides.parquet").to_pylist()
    return {r["slide_id"]: r for r in slides}, read_quarantine(
        out / "quarantine.parquet"
    ).to_pylist()


def test_good_slides(indexed, manifest) -> None:
    slides, quarantine = tables(indexed.out)
    summary = indexed.summary
    assert list(slides) == [f"synth_{i:04d}" for i in range(8)]
    assert quarantine == []
    assert {row["status"] for row in slides.values()} == {"ok"}
    assert {row["label"] for row in slides.values()} == {0, 1}
    assert [row["split"] for row in slides.values()].count("test") == 2
    assert (summary["num_slides"], summary["num_quarantined"], summary["exit_code"]) == (8, 0, 0)
    assert summary["num_tiles"] == sum(row["num_tiles"] for row in slides.values())
    rows = [pq.read_metadata(part_path(indexed.out, name)).num_rows for name in slides]
    assert rows == [row["num_nuclei"] for row in slides.values()]
    assert summary["num_nuclei"] == sum(rows) > 100
    assert json.loads((indexed.out / "summary.json").read_text())["num_slides"] == 8
    page = Path(summary["qc_page"])
    assert page.is_file()
    assert manifest.name in page.read_text(encoding="utf-8")
    assert all((indexed.out / "qc" / f"{name}.thumbnail.jpg").is_file() for name in slides)


@pytest.fixture(scope="module")
def bad_manifest(manifest, tmp_path_factory) -> Path:
    """Two good slides, one with a damaged tile, and one of each kind that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    good = [folder / name for name in ("a.svs", "b.tiff")]
    for target in good:
        source = sorted((manifest.parent / "slides").glob(f"*{target.suffix}"))[0]
        shutil.copyfile(source, target)
    corrupt_tile(good[0], folder / "torn.svs", 6)
    zero_bytes(folder / "empty.svs")
    truncate(good[1], folder / "half.tiff")
    not_a_slide(folder / "text.svs")
    strip_mpp(good[0], folder / "no_scale.svs")
    blank_slide(folder / "glass.svs", size_px=512, mpp=MPP)
    anucleate_slide(folder / "no_nuclei.tiff", layout="generic")
    names = ["a.svs", "b.tiff", "torn.svs", "empty.svs", "half.tiff", "text.svs", "no_scale.svs",
             "glass.svs", "no_nuclei.tiff", "gone.svs"]  # fmt: skip
    lines = [f"{name.split('.')[0]},{name},{i % 2}" for i, name in enumerate(names)]
    path = folder / "manifest.csv"
    path.write_text("\n".join(["slide_id,path,grade", *lines, ""]))
    return path


@pytest.fixture(scope="module")
def bad_index(ray_cluster, bad_manifest, tmp_path_factory):
    """(run folder, what the job returned)."""
    from pipelines import index

    out = tmp_path_factory.mktemp("bad-index") / "index"
    config = index.Config(manifest=bad_manifest, out=out, tile_px=TILE_PX, mpp=MPP, strict=True)
    return out, index.run(config)


def test_every_bad_slide_is_quarantined_and_the_run_finishes(bad_index) -> None:
    out, summary = bad_index
    slides, quarantine = tables(out)
    assert [name for name, row in slides.items() if row["status"] == "ok"] == ["a", "b", "torn"]
    whole = {row["slide_id"]: row for row in quarantine if not row["region"]}
    assert set(whole) == set(CODES)
    for name, codes in CODES.items():
        assert whole[name]["reason_code"] in codes
        assert slides[name]["status"] == whole[name]["reason_code"]
        assert slides[name]["num_tiles"] is None
        assert slides[name]["grade"] in (0, 1)
    assert (summary["num_slides"], summary["num_quarantined"]) == (3, len(CODES))
    assert summary["exit_code"] == 3  # --strict


def test_a_damaged_tile_costs_its_region_alone(bad_index) -> None:
    out, summary = bad_index
    slides, quarantine = tables(out)
    regions = [row for row in quarantine if row["region"]]
    assert 0 < len(regions) == summary["num_quarantined_regions"]
    assert {(row["slide_id"], row["reason_code"]) for row in regions} == {("torn", "decode_error")}
    assert slides["torn"]["num_tiles"] == slides["a"]["num_tiles"] - len(regions)
    assert not any(row["region"] == "" for row in regions)


def test_the_page_names_every_slide_and_reason(bad_index) -> None:
    out, summary = bad_index
    text = Path(summary["qc_page"]).read_text(encoding="utf-8")
    text += "".join(p.read_text(encoding="utf-8") for p in (out / "qc").glob("*.js"))
    for row in tables(out)[1]:
        assert row["slide_id"] in text
        assert row["reason_code"] in text


def test_without_strict_quarantine_is_no_failure_and_nothing_usable_is(
    cytoray, bad_manifest, tmp_path
) -> None:
    rows = [
        line
        for line in bad_manifest.read_text().splitlines()
        if line.startswith(("slide_id", "text", "empty"))
    ]
    path = bad_manifest.parent / "two.csv"
    path.write_text("\n".join([*rows, ""]))
    outcome = cytoray("index", "--manifest", path, "--out", tmp_path / "o", *FLAGS)
    assert outcome.code == 2
    assert "no slide of" in outcome.err
    assert f"{tmp_path}/o/quarantine.parquet" in outcome.err
    assert len(tables(tmp_path / "o")[1]) == 2


def test_resume_passes_over_finished_slides_and_tries_the_others_again(
    cytoray, bad_index, bad_manifest
) -> None:
    out, _ = bad_index
    parts = {name: part_path(out, name) for name in ("a", "b", "torn", *CODES)}
    before = {name: path.stat().st_mtime_ns for name, path in parts.items()}
    shutil.copyfile(bad_manifest.parent / "b.tiff", bad_manifest.parent / "empty.svs")
    argv = ["index", "--manifest", bad_manifest, "--out", out, *FLAGS, "--strict", "--resume"]
    assert cytoray(*argv).code == 3
    after = {name: path.stat().st_mtime_ns for name, path in parts.items()}
    redone = {name for name in parts if after[name] != before[name]}
    assert redone == set(CODES)
    slides, quarantine = tables(out)
    assert slides["empty"]["status"] == "ok"
    assert {row["slide_id"] for row in quarantine} == {"torn", *CODES} - {"empty"}


@pytest.mark.drill
def test_a_killed_driver_and_resume_give_the_same_files(
    cytoray, start_cytoray, indexed, manifest, tmp_path
) -> None:
    """SIGKILL once the first part is there; byte for byte what an undisturbed run wrote."""
    out = tmp_path / "index"
    argv = ["index", "--manifest", manifest, "--out", out, *FLAGS]
    killed = start_cytoray(*argv)
    killed.wait_for(lambda: any((out / "nuclei").glob("[!.]*.parquet")))
    killed.kill()
    finished = {p.name: p.stat().st_mtime_ns for p in (out / "nuclei").glob("[!.]*.parquet")}
    assert 1 <= len(finished) < 8
    assert not (out / "slides.parquet").exists()
    assert cytoray(*argv, "--resume").code == 0
    for name in ("slides.parquet", "quarantine.parquet"):
        assert (out / name).read_bytes() == (indexed.out / name).read_bytes()
    for part in sorted((indexed.out / "nuclei").glob("*.parquet")):
        mine = out / "nuclei" / part.name
        assert mine.read_bytes() == part.read_bytes()
        assert finished.get(part.name, mine.stat().st_mtime_ns) == mine.stat().st_mtime_ns


def test_a_finished_index_resumed_is_the_same_and_quick(cytoray, indexed, manifest) -> None:
    before = (indexed.out / "slides.parquet").read_bytes()
    began = time.monotonic()
    outcome = cytoray("index", "--manifest", manifest, "--out", indexed.out, *FLAGS, "--resume")
    assert outcome.code == 0
    assert "slides: 8/8 slides (100 %)" in outcome.err
    assert (indexed.out / "slides.parquet").read_bytes() == before
    assert time.monotonic() - began < 10


@pytest.fixture
def kill_readers_of():
    """kill_readers_of(path): SIGKILL to every process of our Ray that has the file open."""
    stop = threading.Event()
    threads = []

    def watch(path: Path, kills: list[int]) -> None:
        while not stop.wait(0.01):
            for process in psutil.Process().children(recursive=True):
                try:
                    if any(file.path == str(path) for file in process.open_files()):
                        process.kill()
                        kills.append(process.pid)
                except psutil.Error:
                    continue

    def start(path: Path) -> list[int]:
        kills: list[int] = []
        threads.append(threading.Thread(target=watch, args=(path, kills), daemon=True))
        threads[-1].start()
        return kills

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def test_a_slide_that_kills_its_reader_is_given_up_alone(
    cytoray, manifest, kill_readers_of, tmp_path
) -> None:
    """As a fault in a native library would; with one reader, the others wait behind it."""
    kills = kill_readers_of(sorted((manifest.parent / "slides").iterdir())[1])
    argv = ["index", "--manifest", manifest, "--out", tmp_path / "o", *FLAGS, "--max-actors", 1]
    assert cytoray(*argv).code == 0
    slides, quarantine = tables(tmp_path / "o")
    assert len(set(kills)) == 2
    assert [row["slide_id"] for row in quarantine] == ["synth_0001"]
    assert quarantine[0]["reason_code"] == "reader_crashed"
    assert "died 2 times" in quarantine[0]["message"]
    assert sum(row["status"] == "ok" for row in slides.values()) == 7
