from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cytoray.indexing import (
    IndexedSlide,
    IndexSettings,
    SlideIndexer,
    is_finished,
    part_path,
    read_indexed,
)
from cytoray.nuclei import read_nuclei
from cytoray.patience import Patience
from cytoray.slides import Grid, mask_indices, parse_tile_id, read_manifest
from cytoray.synthetic import (
    anucleate_slide,
    blank_slide,
    corrupt_tile,
    not_a_slide,
    read_truth,
    strip_mpp,
    truncate,
    zero_bytes,
)

from ..conftest import MPP, TILE_PX

SETTINGS = IndexSettings(grid=Grid(tile_px=TILE_PX, mpp=MPP))


@pytest.fixture(scope="module")
def entries(manifest) -> list[dict]:
    return read_manifest(manifest).rows.slice(0, 3).to_pylist()


def read_part(out: Path, slide_id: str) -> IndexedSlide:
    indexed = read_indexed(part_path(out, slide_id))
    assert indexed is not None
    return indexed


def index_file(path: Path, out: Path, settings: IndexSettings = SETTINGS, **entry) -> IndexedSlide:
    indexed = SlideIndexer(settings, out)({"slide_id": "s", "path": str(path), "mpp": None} | entry)
    assert read_part(out, "s") == indexed  # what comes back is what a resumed run will read
    return indexed


def test_a_part_holds_the_slides_row_and_its_nuclei(plain_index, entries) -> None:
    for entry in entries:
        indexed = read_part(plain_index, entry["slide_id"])
        row = indexed.row
        assert indexed.ok
        assert indexed.quarantine == []
        assert (row["width_px_level0"], row["height_px_level0"]) == (1024, 1024)
        assert row["mpp_x"] == pytest.approx(MPP, rel=1e-3)
        assert row["label"] == entry["label"]
        assert row["num_tiles"] == sum(m.bit_count() for m in row["keep_masks"]) > 20
        nuclei = read_nuclei(part_path(plain_index, entry["slide_id"]))
        assert row["num_nuclei"] == len(nuclei)
        assert (nuclei[:, :2] > -1).all()
        assert (nuclei[:, :2] < 1024).all()
        for name in ("thumbnail", "foreground", "density"):
            assert (plain_index / "qc" / f"{entry['slide_id']}.{name}.jpg").stat().st_size > 500


def test_nuclei_lie_on_the_truth(manifest, plain_index, entries) -> None:
    """The detector's own score is tested with it; here frames and chunk borders are at stake."""
    for entry in entries:
        name = entry["slide_id"]
        truth = read_truth(manifest.parent / "truth" / f"{name}.json")
        xy = np.array([[n["x_level0"], n["y_level0"]] for n in truth.nuclei.to_pylist()])
        nuclei = read_nuclei(part_path(plain_index, name))[:, :2]
        distance_um = np.linalg.norm(xy[:, None] - nuclei[None], axis=2).min(axis=1) * MPP
        assert (distance_um < 3).mean() > 0.75
        near = np.sort(np.linalg.norm(nuclei[:, None] - nuclei[None], axis=2), axis=1)[:, 1]
        assert (near * MPP > 1).all()  # none twice where chunks meet


def test_tiles_with_too_few_nuclei_are_left_out(plain_index, entries, tmp_path) -> None:
    """The same nuclei count that a reader of the tiles finds; all other tiles stay."""
    entry = entries[0]
    few = SlideIndexer(replace(SETTINGS, min_nuclei=2), tmp_path)(entry)
    every = read_part(plain_index, entry["slide_id"])
    xy = read_nuclei(part_path(tmp_path, entry["slide_id"]))[:, :2]
    assert few.row["num_nuclei"] == every.row["num_nuclei"] == len(xy)
    per_tile = Counter(map(tuple, (xy // TILE_PX).astype(int).tolist()))
    columns = -(-1024 // TILE_PX)
    chunks = -(-columns // 8)
    kept = []
    for number, (mask, whole) in enumerate(
        zip(few.row["keep_masks"], every.row["keep_masks"], strict=True)
    ):
        for index in mask_indices(whole).tolist():
            place = (number % chunks * 8 + index % 8, number // chunks * 8 + index // 8)
            kept.append(bool(mask >> index & 1))
            assert kept[-1] == (per_tile[place] >= 2), place
    assert 0 < sum(kept) == few.row["num_tiles"] < len(kept)
    assert len(few.tile_focus) == few.row["num_tiles"]


def test_a_slide_without_a_tile_of_enough_nuclei_is_quarantined(entries, tmp_path) -> None:
    indexed = SlideIndexer(replace(SETTINGS, min_nuclei=1000), tmp_path)(entries[0])
    assert indexed.row["status"] == "no_nuclei"
    assert "1000" in indexed.quarantine[0]["message"]


def make_bad(kind: str, source: Path, folder: Path) -> Path:
    target = folder / f"bad{source.suffix}"
    return {
        "empty_file": lambda: zero_bytes(target),
        "not_a_slide": lambda: not_a_slide(target),
        "mpp_missing": lambda: strip_mpp(source, target),
        "no_foreground": lambda: blank_slide(target, size_px=512, mpp=MPP),
        "no_nuclei": lambda: anucleate_slide(target),
        "missing_file": lambda: target,
    }[kind]()


@pytest.mark.parametrize(
    "code",
    ["empty_file", "not_a_slide", "mpp_missing", "no_foreground", "no_nuclei", "missing_file"],
)
def test_a_slide_that_cannot_be_used_is_quarantined(code, entries, tmp_path) -> None:
    path = make_bad(code, Path(entries[0]["path"]), tmp_path)
    indexed = index_file(path, tmp_path / "out", label=1)
    assert not indexed.ok
    assert indexed.row["status"] == code
    assert indexed.row["label"] == 1
    [fault] = indexed.quarantine
    assert (fault["slide_id"], fault["path"], fault["stage"]) == ("s", str(path), "index")
    assert (fault["reason_code"], fault["region"]) == (code, "")
    assert len(fault["message"]) > 20
    assert len(read_nuclei(part_path(tmp_path / "out", "s"))) == 0


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_slide_is_quarantined_wherever_it_ends(fraction, entries, tmp_path) -> None:
    for entry in entries[:2]:
        source = Path(entry["path"])
        path = truncate(source, tmp_path / source.name, fraction)
        status = index_file(path, tmp_path / "out").row["status"]
        assert status in ("truncated", "not_a_slide", "decode_error")


def test_a_corrupt_tile_costs_its_region_alone(entries, plain_index, tmp_path) -> None:
    source = Path(entries[0]["path"])
    good = read_part(plain_index, entries[0]["slide_id"]).row
    indexed = index_file(corrupt_tile(source, tmp_path / source.name, 6), tmp_path / "out")
    assert indexed.ok
    lost = [parse_tile_id(fault["region"]) for fault in indexed.quarantine]
    assert 0 < len(lost) <= 16  # JPEG tile 6 is column 2, row 1: x 512-768, y 256-512
    for fault, (slide_id, grid, column, row, index) in zip(indexed.quarantine, lost, strict=True):
        assert (slide_id, grid) == ("s", SETTINGS.grid)
        assert (column, row) == (1, 0)
        assert index % 8 < 4
        assert 4 <= index // 8 < 8
        assert fault["reason_code"] == "decode_error"
    kept = [set(mask_indices(mask).tolist()) for mask in indexed.row["keep_masks"]]
    before = [set(mask_indices(mask).tolist()) for mask in good["keep_masks"]]
    assert [b - k for b, k in zip(before, kept, strict=True)] == [
        set(), {index for *_, index in lost}, set(), set()
    ]  # fmt: skip
    assert indexed.row["num_tiles"] == good["num_tiles"] - len(lost)
    nuclei = read_nuclei(part_path(tmp_path / "out", "s"))
    assert 0 < len(nuclei) < good["num_nuclei"]


def test_a_given_mpp_serves_where_the_file_has_none(entries, tmp_path) -> None:
    path = strip_mpp(entries[0]["path"], tmp_path / Path(entries[0]["path"]).name)
    row = index_file(path, tmp_path / "out", mpp=MPP).row
    assert (row["status"], row["mpp_source"], row["mpp_x"]) == ("ok", "manifest", MPP)
    assert "mpp" not in row


def test_a_contradicting_mpp_needs_trust(entries, tmp_path) -> None:
    path = Path(entries[0]["path"])
    assert index_file(path, tmp_path / "a", mpp=4 * MPP).row["status"] == "mpp_contradiction"
    settings = replace(SETTINGS, trust_manifest_mpp=True, grid=Grid(tile_px=TILE_PX, mpp=2.0))
    row = index_file(path, tmp_path / "b", settings, mpp=4 * MPP).row
    assert (row["mpp_source"], row["mpp_x"]) == ("manifest", 4 * MPP)


def test_without_a_detector_nothing_is_counted(entries, tmp_path) -> None:
    settings = replace(SETTINGS, detector="none")
    row = index_file(Path(entries[0]["path"]), tmp_path / "out", settings).row
    assert row["status"] == "ok"
    assert row["num_nuclei"] is None
    assert row["num_tiles"] > 20


def test_other_columns_of_any_type_are_no_obstacle(entries, tmp_path) -> None:
    """A CSV with a column of dates gives dates."""
    entry = entries[0] | {"slide_id": "s", "taken": datetime.date(2024, 1, 31), "count": 2}
    assert SlideIndexer(SETTINGS, tmp_path)(entry).ok
    row = read_part(tmp_path, "s").row
    assert (row["taken"], row["count"]) == ("2024-01-31", 2)


def test_an_unforeseen_failure_ends_one_slide_alone(entries, tmp_path) -> None:
    """Here the place of the QC pictures is taken by a file."""
    (tmp_path / "qc").write_text("in the way")
    indexed = SlideIndexer(SETTINGS, tmp_path)(entries[0])
    [fault] = indexed.quarantine
    assert (indexed.row["status"], fault["reason_code"]) == ("unexpected", "unexpected")
    assert "qc" in fault["message"]


def test_finished_is_ok_and_the_same_file(entries, plain_index, tmp_path) -> None:
    entry = entries[0]
    assert is_finished(plain_index, entry)
    assert not is_finished(tmp_path, entry)
    assert not is_finished(plain_index, entry | {"path": "/elsewhere/a.svs"})
    assert not is_finished(plain_index, entry | {"mpp": 0.45})
    source = Path(entry["path"])
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    mine = entry | {"path": str(copy)}
    SlideIndexer(SETTINGS, tmp_path)(mine)
    assert is_finished(tmp_path, mine)
    os.utime(copy, (1, 1))
    assert not is_finished(tmp_path, mine)


def test_a_quarantined_slide_is_not_finished(tmp_path) -> None:
    path = not_a_slide(tmp_path / "a.svs")
    index_file(path, tmp_path)
    assert not is_finished(tmp_path, {"slide_id": "s", "path": str(path), "mpp": None})


KILL_AT = """
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path
from cytoray.patience import Patience
from tests.indexing.test_indexer import SETTINGS
from cytoray.indexing import SlideIndexer
import json
out, entry, call, way = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
patience = Patience(timeout_s=1.0 if way == "hang" else 0, run_token="one run")
indexer = SlideIndexer(replace(SETTINGS, patience=patience), out)
inner, calls = indexer.detect, 0
def detect(pixels, mpp):
    global calls
    calls += 1
    if calls == call:
        if way == "hang":
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(pixels, mpp)
indexer.detect = detect
print(indexer(entry).row["status"])
"""


def indexed_in_a_process(out: Path, entry: dict, call: int, way: str) -> tuple[int, str]:
    """Index in a process of its own that is killed, or hangs, at its n-th detection."""
    root = Path(__file__).parents[2]
    plain = json.dumps({name: entry[name] for name in ("slide_id", "path", "mpp")})
    ended = subprocess.run(
        [sys.executable, "-c", KILL_AT, str(out), plain, str(call), way],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return ended.returncode, ended.stdout.strip()


def counting(indexer: SlideIndexer) -> list[int]:
    """The sizes of the images the indexer's detector is given from now on."""
    inner, seen = indexer.detect, []
    assert inner is not None

    def detect(pixels, mpp):
        seen.append(pixels.size)
        return inner(pixels, mpp)

    indexer.detect = detect  # pyright: ignore[reportAttributeAccessIssue]
    return seen


def test_a_killed_slide_goes_on_at_the_chunk_it_was_killed_in(
    entries, plain_index, tmp_path
) -> None:
    entry = {name: entries[0][name] for name in ("slide_id", "path", "mpp")}
    name = entry["slide_id"]
    code, _ = indexed_in_a_process(tmp_path, entry, 3, "kill")
    assert code == -signal.SIGKILL
    assert not part_path(tmp_path, name).exists()
    settings = replace(SETTINGS, patience=Patience(run_token="the next run"))
    indexer = SlideIndexer(settings, tmp_path)
    seen = counting(indexer)
    indexed = indexer(entry)
    chunks = sum(mask > 0 for mask in indexed.row["keep_masks"])
    assert len(seen) == chunks - 2 > 0
    whole = SlideIndexer(SETTINGS, tmp_path / "unbroken")(entry)
    assert indexed == whole
    one, other = part_path(tmp_path, name), part_path(tmp_path / "unbroken", name)
    assert one.read_bytes() == other.read_bytes()
    assert list((tmp_path / "partial").iterdir()) == []


@pytest.mark.parametrize(
    ("way", "reason", "code"),
    [("kill", "reader_crashed", -signal.SIGKILL), ("hang", "timed_out", 1)],
)
def test_a_slide_that_takes_its_process_along_is_given_up(
    way, reason, code, entries, tmp_path
) -> None:
    entry = entries[0]
    # Two tries end at the first chunk; the third process finds that, and does not try.
    for _ in range(2):
        assert indexed_in_a_process(tmp_path, entry, 1, way)[0] == code
    assert indexed_in_a_process(tmp_path, entry, 1, way) == (0, reason)
    indexed = read_part(tmp_path, entry["slide_id"])
    [fault] = indexed.quarantine
    assert (fault["reason_code"], fault["region"]) == (reason, "")
    assert "2 times" in fault["message"]
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_slide_that_gets_on_between_its_crashes_is_finished(entries, tmp_path) -> None:
    for _ in range(3):  # each try finishes one chunk more, so patience begins anew
        assert indexed_in_a_process(tmp_path, entries[0], 2, "kill")[0] == -signal.SIGKILL
    assert indexed_in_a_process(tmp_path, entries[0], 9, "kill") == (0, "ok")


def test_other_settings_do_not_take_over_chunks(entries, tmp_path) -> None:
    entry = {name: entries[0][name] for name in ("slide_id", "path", "mpp")}
    indexed_in_a_process(tmp_path, entry, 3, "kill")
    indexer = SlideIndexer(replace(SETTINGS, keep_share=0.03), tmp_path)
    seen = counting(indexer)
    indexed = indexer(entry)
    assert len(seen) == sum(mask > 0 for mask in indexed.row["keep_masks"])
