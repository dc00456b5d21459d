from itertools import pairwise

import numpy as np
import pytest

from cytoray.ssl.masks import MaskPolicy, block_mask, make_block_masks, mask_bands

GRID = (14, 14)


@pytest.mark.parametrize("crops", [2, 5, 64, 129])
def test_exactly_half_of_the_crops_each_in_its_band(crops):
    made = make_block_masks(0, 3, num_crops=crops, start=0, stop=crops, grid=GRID)
    per_crop = made.mask.sum(1)
    masked = int(crops * 0.5)
    assert (per_crop > 0).sum() == masked
    bands = mask_bands(seed=0, step=3, num_crops=crops, policy=MaskPolicy())
    assert sorted(bands[bands >= 0].tolist()) == list(range(masked))
    assert ((bands >= 0) == (per_crop > 0)).all()
    upper = np.linspace(0.1, 0.5, masked + 1)[1:]
    assert (per_crop[np.argsort(bands)[-masked:]] <= np.floor(196 * upper)).all()


def test_ratios_are_spread_evenly():
    made = make_block_masks(1, 0, num_crops=400, start=0, stop=400, grid=GRID)
    ratios = np.sort(made.mask.sum(1)[made.mask.any(1)]) / 196
    assert ratios.min() >= 0.06
    assert ratios.max() <= 0.5
    assert abs(ratios.mean() - 0.3) < 0.02
    assert abs(np.quantile(ratios, 0.25) - 0.2) < 0.03


def test_slices_do_not_depend_on_the_ranks():
    whole = make_block_masks(5, 9, num_crops=32, start=0, stop=32, grid=GRID)
    for cuts in ([0, 16, 32], [0, 6, 20, 32]):
        parts = [
            make_block_masks(5, 9, num_crops=32, start=a, stop=b, grid=GRID)
            for a, b in pairwise(cuts)
        ]
        assert np.array_equal(np.concatenate([p.mask for p in parts]), whole.mask)
        assert np.array_equal(np.concatenate([p.weight for p in parts]), whole.weight)


def test_steps_and_seeds_differ():
    def draw(seed, step):
        return make_block_masks(seed, step, num_crops=8, start=0, stop=8, grid=GRID).mask

    assert np.array_equal(draw(0, 0), draw(0, 0))
    assert not np.array_equal(draw(0, 0), draw(0, 1))
    assert not np.array_equal(draw(0, 0), draw(1, 0))


def test_index_and_weight_describe_the_mask():
    made = make_block_masks(2, 2, num_crops=6, start=1, stop=5, grid=(4, 6))
    crops, patches = np.nonzero(made.mask)
    assert np.array_equal(made.index, crops * 24 + patches)
    for crop in range(4):
        if made.mask[crop].any():
            assert made.weight[crops == crop].sum() == pytest.approx(1.0, abs=1e-6)


def test_blocks_are_rectangles():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = block_mask(GRID, 9, rng)
        assert 1 <= mask.sum() <= 9
    big = block_mask(GRID, 98, rng)
    neighbours = (big[1:] & big[:-1]).sum() + (big[:, 1:] & big[:, :-1]).sum()
    scattered = rng.permutation(big.ravel()).reshape(GRID)
    chance = (scattered[1:] & scattered[:-1]).sum() + (scattered[:, 1:] & scattered[:, :-1]).sum()
    assert neighbours > 1.2 * chance


def test_small_grids_and_no_masks():
    tiny = make_block_masks(0, 0, num_crops=8, start=0, stop=8, grid=(2, 2))
    assert (tiny.mask.sum(1) > 0).sum() == 4
    none = make_block_masks(
        0, 0, num_crops=8, start=0, stop=8, grid=GRID, policy=MaskPolicy(share=0.0)
    )
    assert none.index.size == none.weight.size == 0
