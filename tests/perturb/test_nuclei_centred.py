"""Perturbation: what is kept, what is permuted, and what a tile without nuclei gives."""

import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.perturb import (
    CROP_POLICIES,
    near_mask,
    nuclei_centred_views,
    perturb,
    retain_nuclei,
    sample_views,
    shuffle_pixels,
    tile_rng,
)

S = 64


@pytest.fixture
def tile():
    return np.random.default_rng(1).integers(0, 256, (S, S, 3), dtype=np.uint8)


def brute_force_near(centres, radius_px, tile_px):
    y, x = np.mgrid[:tile_px, :tile_px]
    distances = [np.hypot(x - cx, y - cy) for cx, cy in centres]
    return np.min(distances, axis=0) <= radius_px


def colours(pixels):
    """The multiset of RGB triples as a sorted array."""
    return np.sort(pixels.reshape(-1, 3).astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("radius_px", [0.0, 4.0, 12.5, 200.0])
def test_inside_untouched_and_outside_permuted(tile, seed, radius_px):
    rng = np.random.default_rng(seed)
    nuclei = rng.uniform(-8, S + 8, (6, 2))
    nuclei[0] = S / 2
    out, retained = perturb(tile, nuclei, radius_px, rng)
    near = brute_force_near(nuclei[retained], radius_px, S)
    np.testing.assert_array_equal(out[near], tile[near])
    np.testing.assert_array_equal(colours(out[~near]), colours(tile[~near]))
    assert near.all() or (out[~near] != tile[~near]).any(axis=-1).mean() > 0.9


def test_input_tile_is_not_written(tile):
    tile.setflags(write=False)  # as columns that come out of Arrow are
    before = tile.copy()
    out, _ = perturb(tile, np.array([[10.0, 10.0]]), 5.0, tile_rng(0, 0, "a"))
    np.testing.assert_array_equal(tile, before)
    assert out.flags.writeable


def test_radius_is_inclusive():
    near = near_mask(np.array([[20.0, 30.0]]), 10.0, S)
    assert near[30, 30]  # (x, y) = (30, 30): 10 px to the right
    assert near[20, 20]
    assert not near[30, 31]
    assert not near[27, 30]
    np.testing.assert_array_equal(near, brute_force_near([(20.0, 30.0)], 10.0, S))


def test_nucleus_outside_the_tile_keeps_what_its_disc_reaches(tile):
    nuclei = np.array([[-3.0, 10.0], [40.0, 40.0]])
    out, retained = perturb(tile, nuclei, 6.0, tile_rng(0, 0, "a"), (1.0, 1.0))
    assert retained.all()
    np.testing.assert_array_equal(out[8:13, 0:3], tile[8:13, 0:3])


@pytest.mark.parametrize("nuclei", [np.zeros((0, 2)), np.zeros((0, 4), np.float32), np.array([])])
def test_no_nuclei_leaves_the_tile_alone(tile, nuclei):
    out, retained = perturb(tile, nuclei, 10.0, tile_rng(0, 0, "a"))
    assert out is tile
    assert retained.shape == (0,)


def test_nuclei_only_outside_leave_the_tile_alone(tile):
    out, retained = perturb(tile, np.array([[-2.0, 5.0]]), 10.0, tile_rng(0, 0, "a"))
    assert out is tile
    assert retained.all()


def test_further_nuclei_columns_are_ignored(tile):
    xy = np.random.default_rng(3).uniform(0, S, (5, 2))
    table = np.concatenate([xy, np.full((5, 2), 9.0)], axis=1)
    one, _ = perturb(tile, xy, 8.0, tile_rng(0, 0, "a"))
    two, _ = perturb(tile, table, 8.0, tile_rng(0, 0, "a"))
    np.testing.assert_array_equal(one, two)


def test_same_key_same_result_and_other_epoch_another(tile):
    nuclei = np.random.default_rng(3).uniform(0, S, (9, 2))

    def run(epoch):
        return perturb(tile, nuclei, 8.0, tile_rng(5, epoch, "slide:1"))

    np.testing.assert_array_equal(run(0)[0], run(0)[0])
    np.testing.assert_array_equal(run(0)[1], run(0)[1])
    assert (run(0)[0] != run(1)[0]).any()


def test_retained_share_follows_the_range():
    inside = np.ones(40, bool)
    rng = np.random.default_rng(0)
    kept = np.array([retain_nuclei(inside, rng, (0.5, 1.0)).sum() for _ in range(2000)])
    assert kept.min() >= 20
    assert kept.max() == 40
    np.testing.assert_allclose(kept.mean() / 40, 0.75, atol=0.01)


def test_each_nucleus_is_as_likely_to_be_retained():
    rng = np.random.default_rng(0)
    counts = np.sum([retain_nuclei(np.ones(8, bool), rng, (0.5, 0.5)) for _ in range(4000)], axis=0)
    np.testing.assert_allclose(counts / 4000, 0.5, atol=0.04)


def test_at_least_one_nucleus_of_the_tile_is_retained():
    inside = np.array([False, False, True, False])
    rng = np.random.default_rng(0)
    for _ in range(50):
        retained = retain_nuclei(inside, rng, (0.0, 0.0))
        assert retained.tolist() == inside.tolist()


def test_shuffle_is_uniform():
    values = np.arange(4, dtype=np.uint8)
    tiny = np.repeat(values.reshape(2, 2, 1), 3, axis=2)
    rng = np.random.default_rng(0)
    far = np.ones((2, 2), bool)
    seen = np.zeros((4, 4))
    for _ in range(4000):
        seen[np.arange(4), shuffle_pixels(tiny, far, rng)[..., 0].reshape(-1)] += 1
    np.testing.assert_allclose(seen / 4000, 0.25, atol=0.03)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tile": np.zeros((8, 9, 3), np.uint8)}, "square"),
        ({"tile": np.zeros((8, 8, 3), np.float32)}, "uint8"),
        ({"radius_px": -1.0}, "radius_px"),
        ({"retain_fraction": (0.9, 0.2)}, "retain_fraction"),
    ],
)
def test_bad_input_is_named(tile, changed, message):
    arguments = {"tile": tile, "nuclei_xy_px": np.ones((1, 2)), "radius_px": 3.0} | changed
    with pytest.raises(InputError, match=message):
        perturb(**arguments, rng=tile_rng(0, 0, "a"))


def test_views_of_a_perturbed_tile_are_centred_on_retained_nuclei(tile):
    nuclei = np.random.default_rng(3).uniform(0, S, (8, 2))
    policy = CROP_POLICIES["dinov2"]
    for seed in range(20):
        result = nuclei_centred_views(tile, nuclei, 6.0, policy, tile_rng(seed, 0, "a"))
        assert result.has_nuclei
        offset = np.abs(result.views[:, None, :2] - nuclei[result.retained])
        within = (offset <= result.views[:, None, 2:4] / 2 + 1e-3).all(axis=-1)
        assert within.any(axis=1).all()


def test_unperturbed_views_leave_pixels_alone(tile):
    policy = CROP_POLICIES["simclr"]
    nuclei = np.array([[5.0, 6.0], [30.0, 40.0]])
    result = nuclei_centred_views(tile, nuclei, 6.0, policy, tile_rng(0, 0, "a"), perturbed=False)
    assert result.tile is tile
    assert result.retained.all()
    expected = sample_views(nuclei, S, policy, tile_rng(0, 0, "a"))
    np.testing.assert_array_equal(result.views, expected)


def test_tile_without_nuclei_is_flagged(tile):
    policy = CROP_POLICIES["dino"]
    result = nuclei_centred_views(tile, np.zeros((0, 2)), 6.0, policy, tile_rng(0, 0, "a"))
    assert not result.has_nuclei
    assert result.views.shape[0] == policy.num_views
