import pyarrow as pa
import pytest

from cytoray.errors import InputError, SlideError
from cytoray.slides.grid import Grid
from cytoray.slides.manifest import read_manifest
from cytoray.slides.quarantine import (
    QUARANTINE_SCHEMA,
    merge_quarantine,
    quarantine_row,
    read_quarantine,
    row_from_error,
    write_quarantine,
)
from cytoray.slides.slide_table import (
    SLIDE_SCHEMA,
    grid_of_row,
    inspect_slide,
    iter_slide_table,
    read_slide_table,
    slide_schema,
    write_slide_table,
)


def test_inspect_good_and_bad_slides(make_slide, tmp_path):
    make_slide("good.tiff", width=2400, height=2000)
    make_slide("no_mpp.tiff", mpp=None)
    (tmp_path / "empty.svs").touch()
    text = (
        "slide_id,path,label\nz,good.tiff,1\ny,no_mpp.tiff,0\nx,empty.svs,1\n"
        "w,gone.svs,0\nv,manifest.csv,0\n"
    )
    (tmp_path / "manifest.csv").write_text(text)
    manifest = read_manifest(tmp_path / "manifest.csv")
    rows, faults = [], []
    for row in manifest.iter_rows():
        result, fault = inspect_slide(row, Grid(tile_px=128))
        rows.append(result)
        if fault:
            faults.append(fault)
    codes = {fault["slide_id"]: fault["reason_code"] for fault in faults}
    assert codes == {
        "y": "mpp_missing", "x": "empty_file", "w": "missing_file", "v": "not_a_slide",
    }  # fmt: skip
    schema = slide_schema(manifest.rows.schema, manifest.label_columns)
    path = tmp_path / "out" / "slides.parquet"
    write_slide_table(rows, path, schema)
    table = read_slide_table(path)
    assert table.schema.field("keep_masks").type == pa.list_(pa.uint64())
    assert table["slide_id"].to_pylist() == ["v", "w", "x", "y", "z"]
    good = table.to_pylist()[-1]
    assert good["status"] == "ok"
    assert good["label"] == 1
    assert good["mpp_source"] == "file"
    layout = grid_of_row(good)
    assert len(good["keep_masks"]) == layout.num_chunks == 2
    assert layout.keep_array(good["keep_masks"]).sum() == good["num_tiles"] > 0
    assert good["file_size_bytes"] == (tmp_path / "good.tiff").stat().st_size
    assert table["status"].to_pylist()[:4] == [codes[s] for s in "vwxy"]


def test_slide_table_refuses_clashes_and_foreign_files(tmp_path):
    with pytest.raises(InputError, match="rename"):
        slide_schema(pa.schema([("status", pa.string())]), ["status"])
    with pytest.raises(InputError, match="cytoray index"):
        read_slide_table(tmp_path / "none.parquet")


def test_ledger_merges_without_repeats(tmp_path):
    path = tmp_path / "quarantine.parquet"
    assert read_quarantine(path).num_rows == 0
    first = quarantine_row("a", "/a.svs", "index", "decode_error", "tile lost", "a:0")
    merge_quarantine([first, first], path)
    again = quarantine_row("a", "/a.svs", "index", "decode_error", "tile lost again", "a:0")
    other = quarantine_row("b", "/b.svs", "embed", "decode_error", "tile lost", "b:0")
    table = merge_quarantine([again, other], path)
    assert table.schema == QUARANTINE_SCHEMA
    assert table["message"].to_pylist() == ["tile lost again", "tile lost"]
    mended = merge_quarantine([], path, redone=["a", "b"], stage="index")
    assert mended["slide_id"].to_pylist() == ["b"]
    assert read_quarantine(path).equals(mended)
    assert [p.name for p in tmp_path.iterdir()] == ["quarantine.parquet"]


def test_row_from_error():
    row = row_from_error("a", "/a", "index", SlideError("too_small", "tiny", "whole"))
    assert (row["reason_code"], row["message"], row["region"]) == ("too_small", "tiny", "whole")
    row = row_from_error("a", "/a", "index", OSError("disk"))
    assert (row["reason_code"], row["message"]) == ("unexpected", "OSError: disk")


def test_a_table_of_many_rows_depends_on_the_rows_alone(tmp_path):
    rows = [{"slide_id": f"s{i:05d}", "keep_masks": [i, 0]} for i in range(9000)]
    files = []
    for name, some in (("sorted", rows), ("mixed", rows[5000:] + rows[:5000])):
        table = write_slide_table(iter(some), tmp_path / name, SLIDE_SCHEMA)
        assert table["slide_id"].to_pylist() == [row["slide_id"] for row in rows]
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    assert read_slide_table(tmp_path / "mixed").equals(table)
    batches = list(iter_slide_table(tmp_path / "mixed", ["keep_masks"]))
    assert [batch.num_rows for batch in batches] == [4096, 4096, 808]
    assert batches[2].column(0)[807].as_py() == [8999, 0]


def test_a_long_ledger(tmp_path):
    path = tmp_path / "quarantine.parquet"
    rows = [
        quarantine_row(f"s{i:05d}", "/", "index", "decode_error", "x", "t") for i in range(5000)
    ]
    written = write_quarantine(iter(rows), path)
    assert written["slide_id"].to_pylist() == [row["slide_id"] for row in rows]
    newer = [row | {"message": "y"} for row in rows[::-2]]
    merged = merge_quarantine(newer, path, redone=["s00000"], stage="embed")
    assert merged["slide_id"].to_pylist() == [row["slide_id"] for row in rows]
    assert merged["message"].to_pylist() == ["x", "y"] * 2500
    assert merge_quarantine([], tmp_path / "none.parquet").num_rows == 0
