from __future__ import annotations

import numpy as np
import pytest

from cytoray.nuclei import assign_to_tiles, nuclei_in_rectangle, sort_nuclei


@pytest.mark.parametrize(("columns", "rows"), [(8, 8), (5, 2), (1, 1)])
def test_assign_to_tiles_against_a_loop(columns, rows):
    rng = np.random.default_rng(columns)
    xy = rng.uniform(-100, 2000, (700, 2)).astype(np.float32)
    xy[:50] = np.round(xy[:50] / 224) * 224 + (30, 70)  # on the edges of tiles
    tiles = assign_to_tiles(xy, 30, 70, 224, columns, rows)
    assert len(tiles) == rows * columns
    for row in range(rows):
        for column in range(columns):
            left, top = 30 + column * 224, 70 + row * 224
            expected = [
                i for i, (x, y) in enumerate(xy) if left <= x < left + 224 and top <= y < top + 224
            ]
            assert tiles[row * columns + column].tolist() == expected


def test_assign_nothing():
    tiles = assign_to_tiles(np.zeros((0, 2)), 0, 0, 224, 3, 2)
    assert [len(tile) for tile in tiles] == [0] * 6


def test_rectangle_against_a_mask():
    rng = np.random.default_rng(1)
    nuclei = sort_nuclei(rng.integers(0, 50, (2000, 4)).astype(np.float32))
    x, y = nuclei[:, 0], nuclei[:, 1]
    for _ in range(30):
        x0, y0 = rng.integers(-5, 50, 2)
        x1, y1 = x0 + rng.integers(0, 30), y0 + rng.integers(0, 30)
        expected = nuclei[(x >= x0) & (x < x1) & (y >= y0) & (y < y1)]
        assert np.array_equal(nuclei_in_rectangle(nuclei, x0, y0, x1, y1), expected)
    assert nuclei_in_rectangle(nuclei[:0], 0, 0, 9, 9).shape == (0, 4)
