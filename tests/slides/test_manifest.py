import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytoray.errors import InputError
from cytoray.slides import manifest_checks
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


def test_lines_are_those_of_an_editor(tmp_path):
    text = (
        "slide_id,path,note,mpp\n"  # 1
        "\n"
        'a,a.svs,"two\nlines",0.25\n'  # 3, 4
        "\r\n"
        "b,b.svs\n"  # 6
        "c,,,\n"  # 7
        "a,a.svs,,wide\n"  # 8
    )
    message = problems_of(write(tmp_path, text, encoding="utf-8-sig"))
    for part in (
        "line 6: 2 fields where the header has 4",
        "line 7: slide 'c' has an empty path",
        "line 8: mpp 'wide' is not a number",
        "'a' occurs 2 times (lines 3, 8)",
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


def test_planes_of_a_z_stack_become_one_slide(tmp_path):
    text = (
        "slide_id,path,z,patient_id,mpp,label\n"
        "b,b.svs,,p2,0.5,0\n"
        "a,up.svs,1,p1,0.25,1\n"
        "a,a.svs,-1,p1,0.25,1\n"
        "c,c.svs,7,p3,0.5,0\n"
        "a,far.svs,3,p1,0.25,1\n"
    )
    manifest = read_manifest(write(tmp_path, text))
    rows = manifest.rows.to_pylist()
    assert [row["slide_id"] for row in rows] == ["b", "a", "c"]
    assert [row["z"] for row in rows] == [None, -1, 7]
    assert [Path(row["path"]).name for row in rows] == ["b.svs", "a.svs", "c.svs"]
    assert [row["z_values"] for row in rows] == [None, [-1, 1, 3], None]
    assert [Path(p).name for p in rows[1]["z_paths"]] == ["a.svs", "up.svs", "far.svs"]
    assert rows[0]["z_paths"] is rows[2]["z_paths"] is None
    assert [row["label"] for row in rows] == [0, 1, 0]
    assert manifest.label_columns == ("label",)
    assert manifest.rows.schema.field("z_values").type == pa.list_(pa.int64())


def test_a_repeated_or_missing_z_is_a_repeated_slide(tmp_path):
    text = "slide_id,path,z\na,a.svs,0\na,b.svs,0\nb,c.svs,1\nb,d.svs,\nc,e.svs,0\nc,f.svs,2\n"
    message = problems_of(write(tmp_path, text))
    assert "'a' occurs 2 times (lines 2, 3)" in message
    assert "'b' occurs 2 times (lines 4, 5)" in message
    assert "column `z`" in message
    assert "'c'" not in message
    text = "slide_id,path\nq,q.svs\n,a.svs\na,a.svs\nb,b.svs\n,c.svs\na,d.svs\n"
    message = problems_of(write(tmp_path, text))
    assert "'a' occurs 2 times (lines 4, 7)" in message
    assert "line 3: the row has an empty slide_id" in message


def test_planes_must_agree_on_what_a_slide_has_once(tmp_path):
    text = (
        "slide_id,path,z,patient_id,mpp,split,label,note\n"
        "a,a.svs,0,p1,0.25,train,1,s\na,b.svs,1,p2,0.25,train,1,t\n"
        "b,c.svs,0,p3,0.25,train,1,u\nb,d.svs,1,p3,0.5,train,0,v\n"
        "c,e.svs,0,p4,0.25,train,1,w\nc,f.svs,1,p4,0.25,,1,x\n"
        "d,g.svs,0,p5,,,0,y\nd,h.svs,1,p5,,,0,free text may differ\n"
    )
    message = problems_of(write(tmp_path, text))
    for part in (
        "lines 2, 3: planes of slide 'a' disagree on `patient_id`",
        "lines 4, 5: planes of slide 'b' disagree on `mpp`",
        "lines 4, 5: planes of slide 'b' disagree on `label`",
        "lines 6, 7: planes of slide 'c' disagree on `split`",
    ):
        assert part in message
    assert "'d'" not in message
    assert "`note`" not in message
    assert "z_paths" in problems_of(write(tmp_path, "slide_id,path,z_paths\na,a.svs,x\n"))


def test_texts_of_one_hash_are_told_apart(monkeypatch):
    """Every text collides at first; the numbers are right all the same."""
    real = manifest_checks._hashes
    tried = []

    def weak(chunk, salt):
        tried.append(salt)
        return real(chunk, salt) if salt > 1 else np.zeros(len(chunk), np.int64)

    monkeypatch.setattr(manifest_checks, "_hashes", weak)
    column = pa.chunked_array([["b", None, "a"], ["b", "c", "a", None]])
    assert manifest_checks.group_numbers(column).tolist() == [0, -1, 1, 0, 2, 1, -1]
    assert set(tried) == {0, 1, 2}


def test_a_type_holds_for_the_whole_column_not_for_its_beginning(tmp_path):
    count = 40_000  # several blocks of the CSV
    lines = ["slide_id,path,number,grade,flag,day,none"]
    for i in range(count):
        grade = "unknown" if i == count - 1 else i % 3
        number = 0.5 if i == count - 2 else i
        lines.append(f"s{i},a.svs,{number},{grade},{'TRUE' if i % 2 else 'false'},2024-01-05,")
    manifest = read_manifest(write(tmp_path, "\n".join(lines)))
    assert len(manifest.rows["slide_id"].chunks) > 1
    schema = manifest.rows.schema
    types = {name: schema.field(name).type for name in ("number", "grade", "flag", "day", "none")}
    assert types == {
        "number": pa.float64(), "grade": pa.string(), "flag": pa.bool_(), "day": pa.date32(),
        "none": pa.null(),
    }  # fmt: skip
    assert manifest.label_columns == ("grade", "flag")
    assert manifest.rows["slide_id"].to_pylist() == [f"s{i}" for i in range(count)]


def test_lines_are_right_beyond_the_first_block(tmp_path):
    lines = ["slide_id,path,mpp,patient_id,split"]
    lines += [f"slide_number_{i},a.svs,0.25,p{i},train" for i in range(60_000)]
    lines[50_000] = "slide_number_7,a.svs,abc,p3,test"
    lines[55_000] = "x,a.svs"
    message = problems_of(write(tmp_path, "\n".join(lines)))
    assert "slide_id 'slide_number_7' occurs 2 times (lines 9, 50001)" in message
    assert "line 50001: mpp 'abc' is not a number" in message
    assert "patient 'p3' is in several splits (test, train)" in message
    assert "line 55001: 2 fields" in message


def test_many_bad_rows_are_counted(tmp_path):
    lines = ["slide_id,path,mpp"] + [f"a/{i},a.svs,{'x' if i % 2 else 99}" for i in range(30)]
    message = problems_of(write(tmp_path, "\n".join(lines)))
    assert message.count("cannot name a file") == 11
    assert "... and 20 more rows where it cannot name a file" in message
    assert "... and 5 more bad values of mpp" in message
    assert "... and 5 more rows where it has an mpp outside" in message


def test_parquet_categories_and_numbers_that_are_missing(tmp_path):
    table = pa.table(
        {
            "slide_id": pa.array(["a", "b", "c"]).dictionary_encode(),
            "path": ["a.svs"] * 3,
            "mpp": [0.25, float("nan"), None],
            "z": [0.0, float("nan"), 2.0],
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    (tmp_path / "a.svs").touch()
    manifest = read_manifest(tmp_path / "m.parquet")
    assert manifest.rows["mpp"].to_pylist() == [0.25, None, None]
    assert manifest.rows["z"].to_pylist() == [0, None, 2]
    assert manifest.label_columns == ("kind",)
    half = table.set_column(3, "z", pa.array([0.0, 0.5, 2.0]))
    pq.write_table(half, tmp_path / "m.parquet")
    assert "row 2: z 0.5 is not a whole number" in problems_of(tmp_path / "m.parquet")


def private_mb() -> float:
    """Memory of this process that no file and no other process shares."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def test_a_million_rows_are_read_in_batches_and_kept_in_a_file(tmp_path):
    """As one table it was over 500 MB of private memory."""
    count = 1_000_000
    path = tmp_path / "m.parquet"
    with pq.ParquetWriter(path, pa.schema({"slide_id": pa.string(), "path": pa.string(),
                                           "patient_id": pa.string(), "split": pa.string(),
                                           "label": pa.int64()})) as writer:  # fmt: skip
        for low in range(0, count, 50_000):
            rows = range(low, low + 50_000)
            writer.write_table(
                pa.table(
                    {
                        "slide_id": [f"slide_{i}" for i in rows],
                        "path": [f"s3://bucket/some/folder/slide_{i}.svs" for i in rows],
                        "patient_id": [f"p{i // 3}" for i in rows],
                        "split": ["train"] * len(rows),
                        "label": [i % 3 for i in rows],
                    }
                )
            )
    before = private_mb()
    manifest = read_manifest(path)
    assert private_mb() - before < 120
    assert len(manifest) == count
    assert manifest.rows["slide_id"][count - 1].as_py() == f"slide_{count - 1}"
    assert manifest.label_columns == ("label",)
    assert list(tmp_path.iterdir()) == [path]
