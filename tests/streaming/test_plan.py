from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest

from cytoray.errors import InputError
from cytoray.slides import SLIDE_SCHEMA, write_slide_table
from cytoray.streaming.plan import ReadPlan, make_plan, plan_of_index

from ..conftest import MPP, TILE_PX


def slide_table(rows: list[tuple[str, str, list[int] | None]]) -> pa.Table:
    """Slide ids, statuses and keep masks."""
    ids, statuses, masks = zip(*rows, strict=True)
    return pa.table(
        {
            "slide_id": pa.array(ids, pa.string()),
            "status": pa.array(statuses, pa.string()),
            "keep_masks": pa.array(masks, pa.list_(pa.uint64())),
        }
    )


def plan_of(rows: list[tuple[str, str, list[int] | None]]) -> ReadPlan:
    return make_plan(slide_table(rows), tile_px=TILE_PX, mpp=MPP)


def test_empty_chunks_and_refused_slides_are_left_out() -> None:
    plan = plan_of(
        [
            ("a", "ok", [0, 0b101, 0, 2**64 - 1]),
            ("b", "no_nuclei", None),
            ("c", "ok", [0]),
            ("d", "ok", [0b1, 0b10]),
        ]
    )
    assert plan.slides.column("slide_id").to_pylist() == ["a", "c", "d"]
    assert plan.chunk_index.tolist() == [1, 3, 0, 1]
    assert plan.keep_mask.tolist() == [0b101, 2**64 - 1, 0b1, 0b10]
    assert plan.first_chunk.tolist() == [0, 2, 2, 4]
    assert plan.slide_of(np.arange(4)).tolist() == [0, 0, 2, 2]
    assert [plan.tiles_in_chunk(i) for i in range(4)] == [2, 64, 1, 1]
    assert (plan.num_chunks, plan.num_tiles) == (4, 68)


@pytest.mark.parametrize(
    "rows",
    [[("a", "no_foreground", None)], [("a", "ok", [0, 0])], [("a", "ok", [])]],
)
def test_nothing_to_read_is_refused(rows) -> None:
    with pytest.raises(InputError, match="no slide has a tile to use"):
        plan_of(rows)


def test_a_table_in_several_pieces_gives_the_same_plan() -> None:
    rows = [("a", "ok", [3]), ("b", "decode_error", None), ("c", "ok", [0, 7]), ("d", "ok", [1])]
    whole = plan_of(rows)
    pieces = make_plan(
        pa.concat_tables([slide_table([row]) for row in rows]), tile_px=TILE_PX, mpp=MPP
    )
    assert pieces.chunk_index.tolist() == whole.chunk_index.tolist()
    assert pieces.keep_mask.tolist() == whole.keep_mask.tolist()
    assert pieces.first_chunk.tolist() == whole.first_chunk.tolist()


def test_a_plan_of_many_slides_is_small() -> None:
    """Twelve bytes a chunk and one number a slide besides the slide table itself."""
    rows = 20_000
    many = pa.table(
        {
            "slide_id": [f"s{i}" for i in range(rows)],
            "status": ["ok"] * rows,
            "keep_masks": pa.array([[1, 0, 2**64 - 1, 5]] * rows, pa.list_(pa.uint64())),
        }
    )
    plan = make_plan(many, tile_px=TILE_PX, mpp=MPP)
    arrays = (plan.chunk_index, plan.keep_mask, plan.first_chunk)
    assert plan.num_chunks == 3 * rows
    assert plan.num_tiles == 67 * rows
    assert sum(a.nbytes for a in arrays) == 12 * plan.num_chunks + 8 * (rows + 1)


def test_the_masks_lie_in_the_arrays_alone_and_all_in_files(tmp_path) -> None:
    plan = make_plan(
        slide_table([("a", "ok", [3]), ("b", "ok", [0, 7])]),
        tile_px=TILE_PX, mpp=MPP, spool_dir=tmp_path,
    )  # fmt: skip
    assert plan.slides.column_names == ["slide_id", "status"]
    assert list(tmp_path.iterdir()) == []  # nameless: gone with the process
    assert not plan.keep_mask.flags.writeable
    sent = pickle.loads(pickle.dumps(plan))
    assert sent.keep_mask.tolist() == plan.keep_mask.tolist()
    assert sent.slides.equals(plan.slides)
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(plan.keep_mask, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 1  # a store gets the array's own bytes, not a copy
    assert len(head) < 1000


def test_the_plan_of_an_index(tmp_path) -> None:
    """Batch by batch from slides.parquet; splits are chosen on the way."""
    rows = [
        {"slide_id": f"s{i:05d}", "path": f"/{i}", "split": ("train", "test", None)[i % 3],
         "status": "ok" if i % 2 else "no_nuclei", "keep_masks": [0, i + 1] if i % 2 else None,
         "grid_tile_px": 64 if i % 2 else None, "grid_mpp": 0.5 if i % 2 else None}
        for i in range(9000)
    ]  # fmt: skip
    write_slide_table(reversed(rows), tmp_path / "slides.parquet", SLIDE_SCHEMA)
    plan = plan_of_index(tmp_path)
    assert plan.keep_mask.tolist() == [i + 1 for i in range(1, 9000, 2)]
    assert plan.slides["slide_id"].to_pylist() == [f"s{i:05d}" for i in range(1, 9000, 2)]
    assert plan.first_chunk.tolist() == list(range(4501))
    assert set(plan.chunk_index.tolist()) == {1}
    assert (plan.tile_px, plan.mpp) == (64, 0.5)
    some = plan_of_index(tmp_path, ("test",))
    assert some.keep_mask.tolist() == [i + 1 for i in range(1, 9000, 6)]
    with pytest.raises(InputError, match=r"no usable slide.*splits: trian"):
        plan_of_index(tmp_path, ("trian",))
    with pytest.raises(InputError, match="cytoray index"):
        plan_of_index(tmp_path / "none")
