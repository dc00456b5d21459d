from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytoray.errors import InputError
from cytoray.nuclei import NUCLEI_SCHEMA, read_nuclei, read_part_metadata, write_nuclei


def some_nuclei(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1e5, (count, 4)).astype(np.float32)


@pytest.mark.parametrize("count", [0, 1, 500])
def test_round_trip_is_exact_and_keeps_the_order(tmp_path, count):
    nuclei = some_nuclei(count)
    path = tmp_path / "new" / "s1.parquet"
    write_nuclei(path, "s1", nuclei, "classical", {"mpp": "0.5", "who": "Ångström"})
    again = read_nuclei(path)
    assert again.dtype == np.float32
    assert again.shape == (count, 4)
    assert np.array_equal(again, nuclei)
    assert read_part_metadata(path) == {"mpp": "0.5", "who": "Ångström"}


def test_columns_are_those_of_the_contract(tmp_path):
    path = tmp_path / "s1.parquet"
    write_nuclei(path, "s1", some_nuclei(3), "cellpose")
    table = pq.read_table(path)
    assert table.schema.names == NUCLEI_SCHEMA.names
    assert table["slide_id"].to_pylist() == ["s1"] * 3
    assert table["detector"].to_pylist() == ["cellpose"] * 3
    assert table.schema.field("x_level0").type == pa.float32()
    assert read_part_metadata(path) == {}


def test_folder_named_like_a_partition_adds_nothing(tmp_path):
    path = tmp_path / "slide_id=7" / "part.parquet"
    write_nuclei(path, "seven", some_nuclei(2), "classical")
    assert read_nuclei(path).shape == (2, 4)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "s1.parquet"
    write_nuclei(path, "s1", some_nuclei(2), "classical")
    with pytest.raises(ValueError, match=r"\(N, 4\)"):
        write_nuclei(path, "s1", np.zeros((3, 2)), "classical")
    assert len(read_nuclei(path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["s1.parquet"]


def test_unusable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="cytoray index"):
        read_nuclei(tmp_path / "absent.parquet")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError):
        read_nuclei(broken)
    with pytest.raises(InputError):
        read_part_metadata(broken)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"x_level0": [1.0]}), other)
    with pytest.raises(InputError, match="radius_um"):
        read_nuclei(other)
