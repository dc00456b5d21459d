from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

from cytoray.planning import sample_slides


def batches(count: int, *, sizes: bool = True) -> list[pa.RecordBatch]:
    table = pa.table(
        {
            "slide_id": [f"s{i:05d}" for i in range(count)],
            "path": [f"/none/{i}" for i in range(count)],
            "site": [f"site{int(i % 4 == 0)}" for i in range(count)],
            "file_size_bytes": pa.array(
                [1000 + i if sizes else None for i in range(count)], pa.int64()
            ),
        }
    )
    return table.to_batches(max_chunksize=700)


def test_the_sample_is_seeded_and_without_repeats() -> None:
    first, seen = sample_slides(batches(5000), 16, 1)
    assert seen == 5000
    assert len({row["slide_id"] for row in first}) == 16
    assert sample_slides(batches(5000), 16, 1)[0] == first
    assert sample_slides(batches(5000), 16, 2)[0] != first
    few, seen = sample_slides(batches(10), 16, 1)
    assert (len(few), seen) == (10, 10)
    assert sample_slides([], 16, 1) == ([], 0)


def test_sites_and_sizes_stand_as_in_the_whole() -> None:
    for seed in range(20):
        rows, _ = sample_slides(batches(5000), 16, seed)
        sites = Counter(row["site"] for row in rows)
        assert sites["site1"] in (2, 3, 4, 5, 6)  # 4 expected, for a binomial 0 to 8
        sizes = np.array([row["file_size_bytes"] for row in rows if row["site"] == "site0"])
        assert (np.diff(sizes) > 0).all()
        assert sizes.min() < 2000
        assert sizes.max() > 4900


def test_every_slide_has_the_same_chance() -> None:
    hits = Counter(
        row["slide_id"] for seed in range(600) for row in sample_slides(batches(200), 10, seed)[0]
    )
    counts = np.array([hits[f"s{i:05d}"] for i in range(200)])
    assert counts.sum() == 6000
    assert 0.6 < counts.var() / counts.mean() < 1.4  # Poisson-like about 30
    assert counts.min() > 10


def test_a_file_that_is_not_there_counts_as_empty() -> None:
    rows, _ = sample_slides(batches(5, sizes=False), 3, 0)
    assert [row["file_size_bytes"] for row in rows] == [0, 0, 0]
