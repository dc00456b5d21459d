from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.finetune import Columns, read_cells, split_cells


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_csv(labelled_cells) -> None:
    cells = read_cells(labelled_cells)
    assert (len(cells), cells.classes) == (90, ("big", "pale", "red"))
    assert np.bincount(cells.labels).tolist() == [30, 30, 30]
    assert cells.grouped
    assert len(set(cells.groups)) == 30
    assert cells.names[0] == "big/00_0.png"
    assert Path(cells.paths[0]) == labelled_cells.parent / "big/00_0.png"
    assert cells.split is None


def test_a_folder_per_class_is_the_same_but_for_groups(labelled_cells) -> None:
    cells, table = read_cells(labelled_cells.parent), read_cells(labelled_cells)
    assert cells.names == table.names
    assert cells.labels.tolist() == table.labels.tolist()
    assert not cells.grouped
    assert len(set(cells.groups)) == 90
    grouped = read_cells(labelled_cells.parent, Columns(group_pattern=r"^([0-9]+)_"))
    assert grouped.groups.tolist() == table.groups.tolist()


def test_a_folder_with_parts(labelled_cells, tmp_path) -> None:
    for part, name in (("train", "big"), ("train", "red"), ("test", "big"), ("test", "red")):
        shutil.copytree(labelled_cells.parent / name, tmp_path / part / name)
    cells = read_cells(tmp_path)
    assert cells.classes == ("big", "red")
    assert cells.split is not None
    assert [sum(cells.split == part) for part in ("train", "test")] == [60, 60]


def test_other_columns(tmp_path) -> None:
    table = write(tmp_path / "a.csv", "path,label,abnormal,who", "a,x,0,p", "b,y,1,q")
    cells = read_cells(table, Columns(label="abnormal", group="who"))
    assert cells.classes == ("0", "1")
    assert cells.groups.tolist() == ["p", "q"]
    with pytest.raises(InputError, match=r"unknown label column 'grade'; valid: abnormal, label"):
        read_cells(table, Columns(label="grade"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,label", "a,x", "b,x"], r"one class only \(x\)"),
        (["path,label", "a,x", "a,y"], r"line 3: a stands in line 2 already"),
        (
            ["path,label", "", "a,x", "b,", ",y"],
            r"line 5 \(no path\): no path\n  - line 4 \(b\): no label$",
        ),
        (["path,label,split", "a,x,tset", "b,y,"], r"line 2 \(a\): split 'tset' is none of train"),
        (["path,label", ",x", "b,y"], r"line 2 \(no path\): no path"),
        (["file_name,label", "a,x"], r"none of the columns path, image.*there: file_name, label"),
        (["path,label"], "has no rows"),
        (["path,label", '"a,b",x', "b"], r"- line 3: 1 fields where the header has 2$"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_cells(write(tmp_path / "a.csv", *lines))


def test_folders_that_cannot_be_used(labelled_cells, tmp_path) -> None:
    with pytest.raises(InputError, match="no folder or CSV"):
        read_cells(tmp_path / "gone")
    shutil.copytree(labelled_cells.parent / "big", tmp_path / "one" / "big")
    with pytest.raises(InputError, match=r"one class only \(big\)"):
        read_cells(tmp_path / "one")
    shutil.copy(labelled_cells.parent / "red" / "00_0.png", tmp_path / "one" / "loose.png")
    with pytest.raises(InputError, match=r"folder per class(.|\n)*loose\.png"):
        read_cells(tmp_path / "one")
    (tmp_path / "one" / "loose.png").unlink()
    for name in ("bare", ".hidden"):
        (tmp_path / "one" / name).mkdir()
    with pytest.raises(InputError, match=r"without an image(.|\n)*  - bare$"):
        read_cells(tmp_path / "one")
    with pytest.raises(InputError, match="needs a bracket"):
        Columns(group_pattern="[0-9]+")


def test_a_split_keeps_groups_whole_and_hangs_on_the_seed(labelled_cells) -> None:
    cells = read_cells(labelled_cells)
    split = split_cells(cells, val_fraction=0.2, test_fraction=0.3, seed=1)
    assert sorted(np.concatenate(split).tolist()) == list(range(90))
    groups = [set(cells.groups[part]) for part in split]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    for part in split:
        assert set(cells.labels[part]) == {0, 1, 2}
    again = split_cells(cells, val_fraction=0.2, test_fraction=0.3, seed=1)
    assert all((a == b).all() for a, b in zip(split, again, strict=True))
    other = split_cells(cells, val_fraction=0.2, test_fraction=0.3, seed=2)
    assert any(a.tolist() != b.tolist() for a, b in zip(split, other, strict=True))


def test_a_class_with_too_few_groups_is_named(tmp_path) -> None:
    rows = [f"{name}{i},{name},{group}" for name, count in (("rare", 2), ("common", 9))
            for i, group in enumerate(f"{name}{n}" for n in range(count))]  # fmt: skip
    cells = read_cells(write(tmp_path / "a.csv", "path,label,group", *rows))
    with pytest.raises(InputError, match="class 'rare' counts 2 groups"):
        split_cells(cells)


def table_with_split(path: Path, parts: dict[str, str]) -> Path:
    rows = [
        f"{name}{i},{name},g{name}{i // 2},{parts.get(f'g{name}{i // 2}', 'train')}"
        for name in "xy"
        for i in range(16)
    ]
    return write(path, "path,label,group,split", *rows)


def test_a_given_split_is_used_and_a_validation_part_is_cut_from_training(tmp_path) -> None:
    parts = {"gx0": "test", "gy0": "test"}
    cells = read_cells(table_with_split(tmp_path / "a.csv", parts))
    split = split_cells(cells, val_fraction=0.2, test_fraction=0.2)
    assert sorted(cells.names[i] for i in split.test) == ["x0", "x1", "y0", "y1"]
    assert len(split.val) >= 4
    assert not set(cells.groups[split.val]) & set(cells.groups[split.train])


def test_a_group_in_two_given_parts_is_refused(tmp_path) -> None:
    table = table_with_split(tmp_path / "a.csv", {"gx0": "test", "gy0": "test"})
    table.write_text(table.read_text().replace("x1,x,gx0,test", "x1,x,gx0,train"))
    with pytest.raises(InputError, match=r"leaks groups(.|\n)*group gx0 is in train and test"):
        split_cells(read_cells(table))


def test_a_given_split_without_a_class_is_refused(tmp_path) -> None:
    cells = read_cells(table_with_split(tmp_path / "a.csv", {"gx0": "test"}))
    with pytest.raises(InputError, match="no 'y' in test"):
        split_cells(cells)


def test_too_few_groups(tmp_path) -> None:
    table = write(tmp_path / "a.csv", "path,label,group", "a,x,1", "b,x,1", "c,y,2", "d,y,3")
    with pytest.raises(InputError, match=r"at least 3 groups of every class"):
        split_cells(read_cells(table))
