from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.made_study import make_bags, make_index
from cytoray.errors import InputError
from cytoray.mil import open_bags
from cytoray.mil.bags import bag_path
from cytoray.mil.cohort import cohort_facts, distinct_names, read_cohort, read_features
from cytoray.mil.folds import make_folds

COLUMNS = {"label": pa.string(), "second": pa.int64(), "image": pa.string()}


@pytest.fixture
def folder(tmp_path):
    """Six slides of five patients: one without a label at all, one quarantined, one unlabelled."""
    rows = [
        {"slide_id": f"s{i}", "patient_id": f"p{i // 2}", "label": "ab"[i % 2], "second": i % 3,
         "image": f"i{i}"}
        for i in range(6)
    ]  # fmt: skip
    rows[3] |= {"label": None}
    rows[4] |= {"status": "decode_error"}
    rows[5] |= {"label": None, "second": None}
    make_index(tmp_path, rows, COLUMNS)
    make_bags(tmp_path / "bags", {f"s{i}": 0 for i in range(4)})
    return tmp_path


def read(folder, *labels, group=""):
    return read_cohort(folder / "slides.parquet", labels, [open_bags(folder / "bags")], group)


def test_labels_patients_and_what_is_left_out(folder) -> None:
    cohort = read(folder, "label")
    assert cohort.slide_ids == ["s0", "s1", "s2"]
    assert cohort.labels.tolist() == [0, 1, 0]
    assert cohort.tasks == {"label": ("a", "b")}
    assert cohort.task_classes == 2
    assert cohort.groups.tolist() == ["p0", "p0", "p1"]
    assert cohort.left_out == {"no label": ["s3", "s5"], "quarantined": ["s4"]}
    facts = cohort_facts(cohort, [None, None])
    assert facts["classes"] == "a: 2, b: 1"
    assert facts["left out, no label"] == 2


def test_several_labels_may_be_missing(folder) -> None:
    cohort = read(folder, "label", "second")
    assert cohort.slide_ids == ["s0", "s1", "s2", "s3"]
    assert cohort.labels.tolist() == [[0, 0], [1, 1], [0, 2], [-1, 0]]
    assert cohort.task_classes == (2, 3)
    assert cohort.label(3) == (-1, 0)
    features = read_features(open_bags(folder / "bags"), cohort.slide_ids)
    bags = features.bags(cohort, np.array([3, 1]))
    assert [(bag.slide_id, bag.label) for bag in bags] == [("s3", (-1, 0)), ("s1", (1, 1))]
    assert features.name == features.encoder_id == "made"
    assert all(len(f) == len(t) for f, t in zip(features.features, features.tile_ids, strict=True))


def test_a_column_groups_slides_beyond_the_patient(folder) -> None:
    table = pq.read_table(folder / "slides.parquet").to_pylist()
    table[2]["image"] = table[0]["image"]
    make_index(folder, table, COLUMNS)
    cohort = read(folder, "label", group="image")
    assert cohort.groups.tolist() == ["p0", "p0", "p0"]
    assert cohort_facts(cohort, [])["groups (same patient or image)"] == 1
    assert cohort_facts(read(folder, "label"), [])["patients"] == 2
    cohort.leak_columns["image"] = ["x", "y", "x"]
    with pytest.raises(InputError, match="image x is in train and test"):
        make_folds(
            cohort.labels, cohort.groups, folds=0, val_fraction=0.3, test_fraction=0.3, seed=0,
            split=["train", "train", "test"], leak_columns={"image": ["x", "y", "x"]},
        )  # fmt: skip


def test_what_cannot_be_read(folder) -> None:
    with pytest.raises(InputError, match=r"unknown label column 'grade'; valid: image, label, sec"):
        read(folder, "grade")
    with pytest.raises(InputError, match="unknown group column 'foto'"):
        read(folder, "label", group="foto")
    make_bags(folder / "bags", {"strange": 0})
    with pytest.raises(InputError, match="bag strange in"):
        read(folder, "label")


def test_one_class_is_not_enough(folder) -> None:
    table = pq.read_table(folder / "slides.parquet").to_pylist()
    for row in table:
        row["label"] = "a"
    make_index(folder, table, COLUMNS)
    with pytest.raises(InputError, match=r"label 'label' has 1 class\(es\) among the 4 slides"):
        read(folder, "label")


def test_bad_bags_are_named(folder) -> None:
    store = open_bags(folder / "bags")
    path = bag_path(folder / "bags", "s1")
    table = pq.read_table(path)
    values = np.array(table.column("feature").to_pylist(), dtype=np.float16)
    values[0, 0] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    metadata = table.schema.metadata
    pq.write_table(table.set_column(0, "feature", column).replace_schema_metadata(metadata), path)
    with pytest.raises(InputError, match=r"bag s1: features of 1 instances are NaN"):
        read_features(store, ["s0", "s1"])
    make_bags(folder / "bags", {"s2": 0}, width=9)
    with pytest.raises(InputError, match="bag s2: width 9, bag s0 has 16"):
        read_features(open_bags(folder / "bags", check=False), ["s0", "s2"])


def test_a_second_scale_on_demand(folder) -> None:
    features = read_features(open_bags(folder / "bags"), ["s0", "s1"], coarse=True)
    for fine, coarse in zip(features.features, features.coarse, strict=True):
        assert 0 < len(coarse) < len(fine)
        assert coarse.dtype == np.float16


def test_names_of_encoders_differ() -> None:
    assert distinct_names(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


def test_a_second_scale_is_bags_of_larger_tiles_or_means_of_the_tiles(folder) -> None:
    store, ids = open_bags(folder / "bags"), ["s0", "s1"]
    labels, options = {"s0": 0, "s1": 1}, {"seed": 5}
    larger = open_bags(make_bags(folder / "larger", labels, tile_px=128, **options))
    features = read_features(store, ids, coarse=larger)
    for slide_id, view in zip(ids, features.coarse, strict=True):
        assert np.array_equal(view, larger.read(slide_id, dtype=np.float16).features)
    means = read_features(store, ids, coarse=True)
    assert [len(view) for view in means.coarse] != [len(view) for view in features.coarse]
    strange = open_bags(make_bags(folder / "strange", labels, encoder_id="other"))
    with pytest.raises(InputError, match="cannot be the coarse scale") as caught:
        read_features(store, ids, coarse=strange)
    assert caught.value.problems == [
        "made by encoder other, the bags by made",
        "tiles of 32 um are no larger than the bags' 32 um",
    ]
    with pytest.raises(InputError, match="embed them"):
        read_features(store, ["s0", "s2"], coarse=larger)
