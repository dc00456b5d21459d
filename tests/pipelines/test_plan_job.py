from __future__ import annotations

import json

import pytest

from cytoray.indexing import IndexSettings, SlideIndexer, part_path, read_indexed
from cytoray.slides import Grid, read_manifest, slide_schema, write_slide_table
from pipelines import plan

from ..conftest import MPP, TILE_PX

NODES = "4x16cpu@0.5,1x40cpu+8xH100@20"
GRID = ["--tile-px", TILE_PX, "--mpp", MPP]


def rows_of(manifest, index) -> tuple[list[dict], object]:
    """Rows of the slide table of the three slides of `plain_index`."""
    checked = read_manifest(manifest)
    found = [read_indexed(part_path(index, s)) for s in checked.rows["slide_id"].to_pylist()[:3]]
    schema = slide_schema(checked.rows.schema, checked.label_columns)
    return [slide.row for slide in found if slide is not None], schema


def test_tiles_and_nuclei_of_the_index_lie_in_the_interval(
    cytoray, manifest, plain_index, tmp_path
) -> None:
    truth = {"num_tiles": 0, "num_nuclei": 0}
    indexer = SlideIndexer(IndexSettings(grid=Grid(tile_px=TILE_PX, mpp=MPP)), tmp_path / "i")
    for entry in read_manifest(manifest).iter_rows():
        done = read_indexed(part_path(plain_index, entry["slide_id"])) or indexer(entry)
        for name in truth:
            truth[name] += done.row[name]
    outcome = cytoray("plan", "--manifest", manifest, "--nodes", NODES, "--sample", 5, *GRID,
                      "--job", "index", "--out", tmp_path / "o")  # fmt: skip
    assert outcome.code == 0
    written = json.loads((tmp_path / "o" / "plan.json").read_text())
    found = written["forecast"]
    for name, figure in (("num_tiles", found["tiles"]), ("num_nuclei", found["nuclei"])):
        assert figure["low"] <= truth[name] <= figure["high"]
        assert figure["low"] < figure["value"] < figure["high"]
    assert len(written["sample"]) == 5
    assert written["config"]["nodes"] == NODES
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["plan.json"]
    assert "8, of which 5 were read" in outcome.out
    assert "nothing was started" in outcome.out


def test_with_an_index_its_counts_are_taken(cytoray, manifest, plain_index, tmp_path) -> None:
    rows, schema = rows_of(manifest, plain_index)
    refused = rows[0] | {"slide_id": "bad", "status": "no_nuclei", "num_tiles": None}
    write_slide_table([*rows, refused], tmp_path / "index" / "slides.parquet", schema)
    config = plan.Config(
        index=tmp_path / "index", nodes=NODES, epochs=3.0, gpu_tiles_per_s=100.0, sample=2
    )
    found = plan.run(config)
    tiles = sum(row["num_tiles"] for row in rows)
    forecast, work = found["forecast"], found["work"]
    assert forecast["tiles"] == {"value": tiles, "low": tiles, "high": tiles}
    assert forecast["nuclei"]["value"] == sum(row["num_nuclei"] for row in rows)
    assert (work["num_slides"], work["tile_px"], work["has_nuclei"]) == (3, TILE_PX, True)
    assert forecast["quarantined"]["value"] == 0.25
    assert [stage["name"] for stage in forecast["stages"]] == ["read", "perturb", "together"]
    assert forecast["tiles_processed"]["value"] == 3 * tiles
    assert forecast["hours"]["value"] == pytest.approx(3 * tiles / 800 / 3600)
    assert forecast["cost"]["value"] == pytest.approx(3 * tiles / 800 / 3600 * 22)


def test_the_bound_is_printed_as_one_and_a_named_run_is_taken(cytoray, manifest) -> None:
    argv = ["plan", "--manifest", manifest, "--nodes", NODES, "--sample", 2, *GRID]
    outcome = cytoray(*argv, "--run", "unicas")
    text = " ".join(outcome.out.split())
    assert outcome.code == 0
    assert "a bound, not an estimate" in text
    assert "hours at least" in text
    assert "cost at least" in text
    assert "tiles processed 768,000,000" in text
    given = cytoray(*argv, "--gpu-tiles-per-s", 50, "--steps", 10, "--batch-size", 64)
    assert "at least" not in given.out
    assert "tiles processed 640" in " ".join(given.out.split())


def test_all_that_cannot_be_planned_is_said_at_once(cytoray, manifest, tmp_path) -> None:
    outcome = cytoray(
        "plan", "--nodes", "4x16@1,1x8cpu+1xH900@2", "--sample", 0, "--min-focus", 1,
        "--min-nuclei", 1, "--detector", "none",
    )  # fmt: skip
    text = " ".join(outcome.err.replace("│", " ").split())
    assert outcome.code == 2
    for part in ("--sample must be 1 or more", "'4x16@1' is not of the form", "unknown GPU 'H900'",
                 "give --manifest or --index", "--min-focus must be from 0 to below 1",
                 "--min-nuclei needs nuclei"):  # fmt: skip
        assert part in text
    outcome = cytoray("plan", "--manifest", manifest, "--nodes", "4x16cpu@1")
    assert outcome.code == 2
    assert "needs GPUs" in outcome.err
    outcome = cytoray("plan", "--index", "here", "--nodes", NODES, "--min-nuclei", 1)
    assert "an index has left its tiles out already" in " ".join(outcome.err.split())
    outcome = cytoray("plan", "--manifest", manifest, "--nodes", NODES, "--run", "unicorn")
    assert "unknown named run 'unicorn'" in outcome.err


def test_a_sample_of_bad_slides_alone_gives_the_reasons(cytoray, tmp_path) -> None:
    (tmp_path / "a.svs").touch()
    (tmp_path / "b.svs").write_text("no slide")
    (tmp_path / "m.csv").write_text("slide_id,path\na,a.svs\nb,b.svs\n")
    outcome = cytoray("plan", "--manifest", tmp_path / "m.csv", "--nodes", NODES, *GRID)
    assert outcome.code == 2
    assert "not one of the sampled slides can be used" in outcome.err
    assert "a: " in outcome.err
    assert "[empty_file]" in outcome.err
    assert "[not_a_slide]" in outcome.err
