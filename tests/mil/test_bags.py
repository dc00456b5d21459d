import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytoray.errors import InputError
from cytoray.mil.bags import Bag, BagMeta, bag_path, open_bags, read_bag, write_bag

META = BagMeta(
    slide_id="s1",
    tile_px=256,
    mpp=0.5,
    tile_size_level0=512.0,
    encoder_id="abc",
    encoder_name="tiny",
)


def make_bag(slide_id="s1", size=5, width=4, **meta):
    rng = np.random.default_rng(size)
    return Bag(
        rng.normal(size=(size, width)).astype(np.float16),
        rng.uniform(0, 1e5, (size, 2)).astype(np.float32),
        dataclasses.replace(META, slide_id=slide_id, **meta),
        tuple(f"{slide_id}:0.5:256:0_0:{i}" for i in range(size)),
    )


def test_a_bag_comes_back_as_it_was(tmp_path):
    bag = make_bag("case 1/é=2")
    path = write_bag(tmp_path, bag)
    back = read_bag(path)
    assert path.parent.parent == tmp_path
    assert back.meta == bag.meta
    assert back.tile_ids == bag.tile_ids
    assert back.features.dtype == np.float32
    assert np.array_equal(back.features, bag.features.astype(np.float32))
    assert np.array_equal(back.coordinates_level0, bag.coordinates_level0)
    assert read_bag(path, dtype=np.float16).features.dtype == np.float16
    assert open_bags(tmp_path).slide_ids == ["case 1/é=2"]
    assert len(list(path.parent.iterdir())) == 1


def test_columns_are_the_contract(tmp_path):
    schema = pq.read_schema(write_bag(tmp_path, make_bag(width=6)))
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types == {
        "feature": "fixed_size_list<element: halffloat>[6]",
        "x_level0": "float",
        "y_level0": "float",
        "tile_id": "string",
    }


def test_store_reads_lazily_and_knows_its_slides(tmp_path):
    for slide_id, size in (("b", 3), ("a", 9)):
        write_bag(tmp_path, make_bag(slide_id, size))
    store = open_bags(tmp_path)
    assert store.slide_ids == ["a", "b"]
    assert "a" in store
    assert store.info("a").num_instances == 9
    assert [len(bag) for bag in store] == [9, 3]
    with pytest.raises(InputError, match="no bag for slide 'c'"):
        store.read("c")
    with pytest.raises(InputError, match="no bag for slide 'd'"):
        store.check(["a", "c", "d"])


def test_mixed_bags_are_refused_all_at_once(tmp_path):
    write_bag(tmp_path, make_bag("a"))
    write_bag(tmp_path, make_bag("b", encoder_id="other"))
    write_bag(tmp_path, make_bag("c", width=7))
    write_bag(tmp_path, make_bag("d", mpp=0.25))
    with pytest.raises(InputError) as error:
        open_bags(tmp_path)
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "bag b",
        "bag c",
        "bag d",
    ]
    assert len(open_bags(tmp_path, check=False)) == 4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": np.zeros((0, 4), np.float16)}, "no instance"),
        ({"features": np.full((5, 4), np.nan, np.float16)}, "NaN or infinite"),
        ({"features": np.full((5, 4), 1e6, np.float32)}, "NaN or infinite"),
        ({"coordinates_level0": np.zeros((4, 2), np.float32)}, "coordinates"),
        ({"tile_ids": ("x",)}, "tile ids"),
    ],
)
def test_bad_bags_are_not_written(tmp_path, change, match):
    with pytest.raises(InputError, match=match) as error:
        write_bag(tmp_path, dataclasses.replace(make_bag(), **change))
    assert "bag s1" in str(error.value)
    assert not bag_path(tmp_path, "s1").exists()


def test_nan_in_a_file_is_found_when_it_is_read(tmp_path):
    path = write_bag(tmp_path, make_bag(size=3))
    table = pq.read_table(path)
    values = table.column("feature").chunk(0).flatten().to_numpy(zero_copy_only=False).copy()
    values[5] = np.nan
    feature = pa.FixedSizeListArray.from_arrays(pa.array(values), 4)
    pq.write_table(table.set_column(0, "feature", feature), path)
    with pytest.raises(InputError, match=r"bag s1: features of 1 instances.*first: 1"):
        open_bags(tmp_path).read("s1")


def test_other_files_and_moved_bags_are_named(tmp_path):
    path = write_bag(tmp_path, make_bag("a"))
    path.parent.rename(tmp_path / "slide_id=b")
    with pytest.raises(InputError, match="wrong folder"):
        open_bags(tmp_path)
    junk = tmp_path / "junk.parquet"
    junk.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="is not a bag"):
        read_bag(junk)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no bag"):
        open_bags(tmp_path / "empty")
    with pytest.raises(InputError, match="no folder"):
        open_bags(tmp_path / "nowhere")
