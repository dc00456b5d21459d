from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cytoray.indexing import IndexSettings, SlideIndexer, part_path, read_indexed
from cytoray.perturb import CROP_POLICIES
from cytoray.planning import MeasureSettings, measure_slide
from cytoray.planning.measure import bytes_read
from cytoray.slides import Grid, read_manifest
from cytoray.synthetic import corrupt_tile, not_a_slide, strip_mpp

from ..conftest import MPP, TILE_PX

SETTINGS = MeasureSettings(
    grid=Grid(tile_px=TILE_PX, mpp=MPP), chunks_per_slide=1000, policy=CROP_POLICIES["dinov2"]
)


def test_a_slide_read_whole_is_measured_as_the_index_finds_it(manifest, plain_index) -> None:
    entry = read_manifest(manifest).rows.slice(0, 1).to_pylist()[0]
    indexed = read_indexed(part_path(plain_index, entry["slide_id"]))
    assert indexed is not None
    found = measure_slide(entry, SETTINGS)
    assert found.tiles == indexed.row["num_tiles"]
    assert found.nuclei == indexed.row["num_nuclei"]
    assert found.chunks == sum(mask != 0 for mask in indexed.row["keep_masks"])
    assert (found.reason, found.bad_tiles) == ("", 0)
    assert min(found.slide_s, found.read_s, found.detect_s, found.perturb_s) > 0
    size = Path(entry["path"]).stat().st_size
    assert 0.3 * size < found.chunk_bytes < 2 * size
    part = measure_slide(entry, replace(SETTINGS, chunks_per_slide=1, policy=None))
    assert part.tiles == found.tiles
    assert part.perturb_s < found.perturb_s
    assert part.nuclei == pytest.approx(found.nuclei, rel=0.6)


def test_what_would_be_quarantined_says_why(manifest, tmp_path) -> None:
    source = Path(read_manifest(manifest).rows["path"][0].as_py())
    not_a_slide(tmp_path / "text.svs")
    strip_mpp(source, tmp_path / f"bare{source.suffix}")
    codes = [
        measure_slide({"slide_id": "s", "path": str(path)}, SETTINGS).reason
        for path in (
            tmp_path / "text.svs",
            tmp_path / f"bare{source.suffix}",
            tmp_path / "gone.svs",
        )
    ]
    assert codes == ["not_a_slide", "mpp_missing", "missing_file"]


def test_a_damaged_tile_is_expected_to_be_lost(manifest, tmp_path) -> None:
    source = Path(read_manifest(manifest).rows["path"][0].as_py())
    corrupt_tile(source, tmp_path / f"torn{source.suffix}", 5)
    entry = {"slide_id": "s", "path": str(tmp_path / f"torn{source.suffix}")}
    whole = measure_slide({"slide_id": "s", "path": str(source)}, SETTINGS)
    torn = measure_slide(entry, SETTINGS)
    assert torn.bad_tiles > 0
    assert torn.tiles + torn.bad_tiles == whole.tiles


@pytest.mark.parametrize(
    ("least", "problem"),
    [
        ({"min_nuclei": 2}, "no_nuclei"),
        ({"min_nuclei": 1000}, "no_nuclei"),
        ({"min_focus": 0.6}, "out_of_focus"),
        ({"min_focus": 0.999}, "out_of_focus"),
        ({"min_nuclei": 1, "min_focus": 0.6}, "no_nuclei"),
    ],
)
def test_tiles_are_left_out_as_by_the_index(manifest, tmp_path, least, problem) -> None:
    entry = read_manifest(manifest).rows.slice(0, 1).to_pylist()[0]
    plain = IndexSettings(grid=SETTINGS.grid, keep_share=SETTINGS.keep_share)
    indexed = SlideIndexer(replace(plain, **least), tmp_path)(entry)
    found = measure_slide(entry, replace(SETTINGS, **least))
    if indexed.row["status"] == "ok":
        assert found.tiles == indexed.row["num_tiles"]
        assert found.tiles < measure_slide(entry, SETTINGS).tiles
    else:
        assert (found.reason, found.tiles) == (indexed.row["status"], 0)
        assert found.reason == problem


def test_bytes_are_counted(tmp_path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0" * 100_000)
    before = bytes_read()
    path.read_bytes()
    assert 100_000 <= bytes_read() - before < 200_000
