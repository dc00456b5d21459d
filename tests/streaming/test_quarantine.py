from __future__ import annotations

import json

from cytoray.errors import SlideError
from cytoray.slides import SLIDE_SCHEMA, read_quarantine, write_slide_table
from cytoray.streaming.plan import plan_of_index
from cytoray.streaming.quarantine import quarantine_facts

from ..conftest import MPP, TILE_PX


def row(slide_id: str, status: str) -> dict:
    return {
        "slide_id": slide_id, "path": f"/slides/{slide_id}.svs", "status": status,
        "grid_tile_px": TILE_PX, "grid_mpp": MPP, "keep_masks": [3] if status == "ok" else None,
    }  # fmt: skip


def test_slides_and_tiles_that_were_not_used_are_counted_and_tabled(tmp_path) -> None:
    index, out = tmp_path / "index", tmp_path / "run"
    index.mkdir()
    out.mkdir()
    slides = [row("a", "ok"), row("b:c", "ok"), row("d", "not_a_slide"), row("e", "ok")]
    write_slide_table(slides, index / "slides.parquet", SLIDE_SCHEMA)
    plan = plan_of_index(index)
    nothing = quarantine_facts(index, out, plan)
    assert (nothing["num_quarantined_slides"], nothing["num_quarantined_tiles"]) == (1, 0)

    torn = str(SlideError("decode_error", "tile cannot be decoded"))
    slow = str(SlideError("timed_out", "a chunk took more than 9 s"))
    lines = {
        0: [("a:0.5:64:0_0:1", torn), ("b:c:0.5:64:0_0:0", slow)],
        1: [("a:0.5:64:0_0:1", torn), ("b:c:0.5:64:0_0:1", slow), ("e:0.5:64:0_0:0", "gone")],
    }
    for rank, tiles in lines.items():
        text = [json.dumps({"tile_id": tile, "message": message}) for tile, message in tiles]
        (out / f"quarantine-rank{rank}.jsonl").write_text("\n".join([*text, '{"tile_id": "to']))
    facts = quarantine_facts(index, out, plan)
    assert facts == {
        "num_quarantined_slides": 2,  # `d` by the index, `b:c` given up while training
        "num_quarantined_tiles": 4,
        "quarantine": f"{index / 'quarantine.parquet'}, {out / 'quarantine.parquet'}",
    }
    table = read_quarantine(out / "quarantine.parquet").to_pylist()
    found = {entry["region"]: (entry["path"], entry["reason_code"]) for entry in table}
    assert found == {
        "a:0.5:64:0_0:1": ("/slides/a.svs", "decode_error"),
        "b:c:0.5:64:0_0:0": ("/slides/b:c.svs", "timed_out"),
        "b:c:0.5:64:0_0:1": ("/slides/b:c.svs", "timed_out"),
        "e:0.5:64:0_0:0": ("/slides/e.svs", "decode_error"),
    }
    assert {entry["stage"] for entry in table} == {"pretrain"}
