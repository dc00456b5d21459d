from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from cytoray.errors import InputError
from cytoray.text_table import read_text_table

ROWS = ["id,note,n", "0012, a ,1", "", '"x","two', 'lines, ""one"" text",NA', "last,,3"]


def write(path: Path, text: str, **options) -> Path:
    path.write_bytes(text.encode(**options))
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_values_are_those_of_pandas_and_lines_those_of_an_editor(tmp_path, end: str) -> None:
    path = write(tmp_path / "t.csv", end.join(ROWS), encoding="utf-8-sig")
    table = read_text_table(path)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    for name in frame.columns:
        assert table.columns[name] == frame[name].str.strip().tolist()
    editor = path.read_text(encoding="utf-8-sig").splitlines()
    assert [editor[n - 1].split(",")[0].strip('"') for n in table.numbers] == ["0012", "x", "last"]
    assert table.where(1) == "line 4"
    assert table.take([2, 0]).where(0, 1) == "lines 6, 2"


def test_parquet_has_rows(tmp_path) -> None:
    frame = pd.DataFrame({"id": [7, 8], "note": [None, " b "], "many": [[1], [2]]})
    folder = tmp_path / "slide_id=q"
    folder.mkdir()
    frame.to_parquet(folder / "t.parquet")
    table = read_text_table(folder / "t.parquet")
    assert table.columns == {"id": ["7", "8"], "note": ["", "b"], "many": ["", ""]}
    assert table.where(1) == "row 2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"a;b\n1;2\n", "separate the columns with commas"),
        (b"a,b,a\n1,2\n1,2,3\n1,2,3,4\n",
         r"'a' occurs more than once(.|\n)*line 2: 2 fields(.|\n)*line 4: 4 fields"),
        (b"a,b\n\xe9,2\n", "save the file as UTF-8"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used(tmp_path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text_table(tmp_path / "t.csv")


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        read_text_table(tmp_path)
    write(tmp_path / "t.parquet", "not parquet")
    with pytest.raises(InputError, match="cannot be read"):
        read_text_table(tmp_path / "t.parquet")
