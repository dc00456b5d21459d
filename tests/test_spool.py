from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from cytoray.spool import ArraySpool, TableSpool, iter_taken, spool_table, take_rows


def pieces() -> list[pa.RecordBatch]:
    return [
        pa.record_batch({"n": list(range(low, high)), "s": [f"t{i}" for i in range(low, high)]})
        for low, high in ((0, 3), (3, 3), (3, 10), (10, 11))
        if high > low
    ]


def test_a_spooled_table_is_the_same_and_leaves_no_file(tmp_path) -> None:
    table = spool_table(pieces(), pieces()[0].schema, tmp_path)
    assert table["n"].to_pylist() == list(range(11))
    assert table["s"].to_pylist() == [f"t{i}" for i in range(11)]
    assert list(tmp_path.iterdir()) == []
    assert spool_table([], table.schema, tmp_path).num_rows == 0


def test_batches_are_put_together(tmp_path) -> None:
    with TableSpool(pieces()[0].schema, tmp_path, together=5) as spool:
        for batch in pieces():
            spool.write(batch)
        table = spool.table()
    assert [batch.num_rows for batch in table.to_batches()] == [10, 1]
    assert table["n"].to_pylist() == list(range(11))


def test_a_spool_given_up_leaves_no_file(tmp_path) -> None:
    def fail() -> None:
        with TableSpool(pieces()[0].schema, tmp_path) as spool:
            spool.write(pieces()[0])
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_rows_are_taken_in_the_order_asked_for() -> None:
    table = pa.Table.from_batches(pieces())
    rows = np.array([10, 0, 4, 4, 2, 9])
    assert take_rows(table, rows)["n"].to_pylist() == rows.tolist()
    assert take_rows(table, rows[:0]).num_rows == 0
    taken = list(iter_taken(table, rows, 4))
    assert [t.num_rows for t in taken] == [4, 2]
    assert pa.concat_tables(taken)["s"].to_pylist() == [f"t{i}" for i in rows]


def test_a_spooled_array(tmp_path) -> None:
    spool = ArraySpool(np.uint64, tmp_path)
    for part in ([1, 2], [], [2**63]):
        spool.write(np.array(part, np.uint64))
    values = spool.array()
    assert type(values) is np.ndarray
    assert values.dtype == np.uint64
    assert values.tolist() == [1, 2, 2**63]
    assert not values.flags.writeable
    assert ArraySpool(np.int32, tmp_path).array().tolist() == []
    assert list(tmp_path.iterdir()) == []
