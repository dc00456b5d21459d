import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytoray.errors import InputError
from cytoray.slides.manifest import CANONICAL_COLUMNS, read_manifest


def write(folder: Path, text: str, name: str = "manifest.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_text(text, encoding=encoding)
    (folder / "a.svs").touch()
    return path


def problems_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_manifest(path)
    return str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_with_defaults_filled_in(tmp_path, encoding):
    text = "slide_id,path,mpp,label,note\n001,a.svs,0.25,1,x\n002,sub/b.svs,,0,\n"
    manifest = read_manifest(write(tmp_path, text, encoding=encoding))
    rows = manifest.rows.to_pylist()
    assert manifest.rows.column_names[: len(CANONICAL_COLUMNS)] == list(CANONICAL_COLUMNS)
    assert [row["slide_id"] for row in rows] == ["001", "002"]
    assert [row["patient_id"] for row in rows] == ["001", "002"]
    assert [row["mpp"] for row in rows] == [0.25, None]
    assert rows[1]["path"] == str(tmp_path / "sub" / "b.svs")
    assert rows[0]["site"] is None
    assert rows[0]["split"] is None
    assert "label" in manifest.label_columns
    assert list(manifest.iter_rows()) == rows


def test_parquet_and_paths_that_stay(tmp_path):
    table = pa.table(
        {"slide_id": ["a", "b"], "path": ["/data/a.svs", "s3://bucket/b.svs"], "grade": [1, 2]}
    )
    path = tmp_path / "m.parquet"
    pq.write_table(table, path)
    manifest = read_manifest(path)
    assert manifest.rows["path"].to_pylist() == ["/data/a.svs", "s3://bucket/b.svs"]
    assert manifest.label_columns == ("grade",)


def test_label_columns_leave_out_what_is_no_label(tmp_path):
    lines = ["slide_id,path,label,kind,boxes,weight,barcode"]
    for i in range(60):
        lines.append(f's{i},a.svs,{i % 2},{"xy"[i % 2]},"[[1, 2]]",{i / 7},code{i}')
    manifest = read_manifest(write(tmp_path, "\n".join(lines)))
    assert manifest.label_columns == ("label", "kind")


def test_every_problem_is_reported_at_once(tmp_path):
    text = (
        "slide_id,path,patient_id,mpp,split\n"
        "a,a.svs,p1,0.25,train\n"
        "a,a.svs,p1,0.25,test\n"
        ",a.svs,p2,0.25,train\n"
        "x/y,a.svs,p3,0.25,train\n"
        "c,,p4,abc,train\n"
        "d,a.svs,p5,353,train\n"
    )
    message = problems_of(write(tmp_path, text))
    for part in (
        "'a' occurs 2 times (lines 2, 3)",
        "line 4: the row has an empty slide_id",
        "line 5: slide 'x/y' cannot name a file",
        "line 6: slide 'c' has an empty path",
        "line 6: mpp 'abc' is not a number",
        "line 7: slide 'd' has an mpp outside",
        "patient 'p1' is in several splits (test, train)",
    ):
        assert part in message


def test_missing_columns_are_all_named(tmp_path):
    message = problems_of(write(tmp_path, "id,file\n1,2\n"))
    assert "`slide_id` is missing" in message
    assert "`path` is missing" in message


def test_semicolons_are_explained(tmp_path):
    assert "commas" in problems_of(write(tmp_path, "slide_id;path\n1;2\n"))


def test_ragged_line_and_repeated_header(tmp_path):
    message = problems_of(write(tmp_path, "slide_id,path,path\na,a.svs,a.svs\nb,a.svs\n"))
    assert "line 3: 2 fields" in message
    assert "`path` occurs more than once" in message


def test_no_rows_says_so(tmp_path):
    assert "no rows" in problems_of(write(tmp_path, "slide_id,path\n"))


def test_unreadable_bytes(tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes(b"slide_id,path\n\xff\xfe\xe9,a.svs\n")
    assert "UTF-8" in problems_of(path)


def test_absent_manifest(tmp_path):
    assert "no manifest at" in problems_of(tmp_path / "none.csv")


def test_one_missing_file_is_left_to_quarantine_but_not_all(tmp_path):
    manifest = read_manifest(write(tmp_path, "slide_id,path\na,a.svs\nb,gone.svs\n"))
    assert len(manifest) == 2
    message = problems_of(write(tmp_path, "slide_id,path\na,gone1.svs\nb,gone.svs\n", "n.csv"))
    assert "none of the 2 files exists" in message


def test_a_million_rows_in_bounded_time(tmp_path):
    count = 1_000_000
    table = pa.table(
        {
            "slide_id": [f"s{i}" for i in range(count)],
            "path": ["s3://bucket/a.svs"] * count,
            "patient_id": [f"p{i // 3}" for i in range(count)],
            "split": ["train"] * count,
            "label": [i % 3 for i in range(count)],
        }
    )
    path = tmp_path / "m.parquet"
    pq.write_table(table, path)
    started = time.perf_counter()
    manifest = read_manifest(path)
    assert len(manifest) == count
    assert time.perf_counter() - started < 30
