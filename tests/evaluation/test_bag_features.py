from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytoray.errors import InputError
from cytoray.evaluation.bag_features import bag_features, open_stores, read_labels
from cytoray.finetune import Columns
from cytoray.mil import Bag, BagMeta, write_bag


def tile_name(slide: str, index: int) -> str:
    return f"{slide}:0.5:64:0_0:{index}"


def make_bags(folder: Path, slides: str, encoder: str = "e") -> Path:
    """Bags of three tiles whose features tell slide and tile."""
    for slide in slides:
        values = np.array([[ord(slide), i] for i in range(3)], dtype=np.float32)
        meta = BagMeta(slide_id=slide, tile_px=64, mpp=0.5, tile_size_level0=64.0,
                       encoder_id=encoder, encoder_name=f"name-{encoder}")  # fmt: skip
        ids = tuple(tile_name(slide, i) for i in range(3))
        write_bag(folder, Bag(values, np.zeros((3, 2), np.float32), meta, ids))
    return folder


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_slides_are_the_mean_of_their_tiles(tmp_path) -> None:
    stores = open_stores([make_bags(tmp_path / "a", "abc"), make_bags(tmp_path / "b", "ab", "f")])
    assert list(stores) == ["name-e", "name-f"]
    table = write(tmp_path / "l.csv", "slide_id,label,patient_id", "a,x,p", "b,y,q", "c,x,p", "d,,")
    labels = read_labels(table)
    cells, unit = labels.cells, labels.unit
    assert labels.unlabelled == ("d (line 5)",)
    assert (unit, cells.names, cells.classes) == ("slide_id", ("a", "b", "c"), ("x", "y"))
    assert cells.groups.tolist() == ["p", "q", "p"]
    (first, second), missing = bag_features(list(stores.values()), cells, unit)
    np.testing.assert_array_equal(first, [[97, 1], [98, 1], [99, 1]])
    np.testing.assert_array_equal(second[:2], first[:2])
    assert missing == [2]


def test_tiles_belong_to_their_slide_unless_a_group_is_given(tmp_path) -> None:
    store = open_stores([make_bags(tmp_path / "a", "ab")])["name-e"]
    rows = [f"{tile_name(s, i)},{'xy'[i % 2]}" for s in "ab" for i in (2, 1)]
    labels = read_labels(write(tmp_path / "l.csv", "tile_id,label", *rows))
    cells, unit = labels.cells, labels.unit
    assert labels.unlabelled == ()
    assert (unit, cells.grouped, cells.groups.tolist()) == ("tile_id", True, ["a", "a", "b", "b"])
    [features], missing = bag_features([store], cells, unit)
    np.testing.assert_array_equal(features, [[97, 2], [97, 1], [98, 2], [98, 1]])
    assert missing == []
    more = write(tmp_path / "m.csv", "tile_id,label", *rows, f"{tile_name('a', 9)},x",
                 f"{tile_name('z', 0)},y")  # fmt: skip
    cells = read_labels(more).cells
    assert bag_features([store], cells, unit)[1] == [4, 5]


def test_labels_from_a_slide_table(tmp_path) -> None:
    table = pa.table({"slide_id": ["a", "b"], "grade": [0, 1], "patient_id": ["p", "q"],
                      "masks": [[1], [2]], "label": [None, "y"]})  # fmt: skip
    pq.write_table(table, tmp_path / "slides.parquet")
    cells = read_labels(tmp_path / "slides.parquet", Columns(label="grade")).cells
    assert cells.classes == ("0", "1")
    with pytest.raises(InputError, match=r"'label' has one class only \(y\)"):
        read_labels(tmp_path / "slides.parquet")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["id,label", "a,x"], "needs a column tile_id or slide_id"),
        (["slide_id,grade", "a,x"], "unknown label column 'label'; valid: grade, slide_id"),
        (
            ["slide_id,label", "a,x", "", "a,y", ",x"],
            r"- line 5: no slide_id\n  - line 4: a stands in line 2 already$",
        ),
        (
            ["slide_id,label,grade", "a,,1", "b, ,2"],
            r"'label' is empty in all 2 rows; .* --columns.label \(there: slide_id, label, grade\)",
        ),
        (["slide_id,label"], "has no rows; add one per slide"),
        (["tile_id,label", "a,x", "b,y"], r"'a' is not a tile id: it should read SLIDE:"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_labels(write(tmp_path / "l.csv", *lines))
