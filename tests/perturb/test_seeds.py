"""Seeds of tiles: golden values (they must never change) and independence."""

import numpy as np

from cytoray.perturb import tile_rng, tile_seed


def test_seed_golden_values():
    assert tile_seed(0, 0, "slide:0.25:224:0_0:0") == 3603179616969511239
    assert tile_seed(7, 3, "slide:0.25:224:12_5:63") == 5524704000196474385


def test_stream_golden_values():
    rng = tile_rng(7, 3, "slide:0.25:224:12_5:63")
    np.testing.assert_array_equal(rng.integers(0, 1000, 5), [840, 857, 134, 822, 448])


def test_every_part_of_the_key_matters():
    seeds = {
        tile_seed(*key)
        for key in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 10, "a"), (11, 0, "a")]
    }
    assert len(seeds) == 6


def test_seeds_are_spread_over_63_bits():
    seeds = np.array([tile_seed(0, 0, f"s:{i}") for i in range(2000)])
    assert seeds.min() >= 0
    assert seeds.dtype == np.int64
    assert len(set(seeds.tolist())) == 2000
    np.testing.assert_allclose(seeds.mean() / 2**63, 0.5, atol=0.03)
