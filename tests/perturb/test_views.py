"""Crop policies and the rows of views drawn from them."""

from dataclasses import replace

import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.perturb import (
    CROP_POLICIES,
    NUM_VIEW_PARAMS,
    VIEW_COLUMN,
    CropPolicy,
    identity_views,
    sample_views,
    tile_rng,
)

S = 128
NUCLEI = {
    "middle": np.array([[60.0, 70.0]]),
    "corner": np.array([[0.0, 127.9]]),
    "many": np.random.default_rng(0).uniform(0, S, (12, 2)),
}


def draw(policy, nuclei=NUCLEI["many"], tiles=200):
    """Rows of many tiles, (tiles, V, P), in float64."""
    rows = [sample_views(nuclei, S, policy, tile_rng(0, 0, f"t{i}")) for i in range(tiles)]
    return np.stack(rows).astype(np.float64)


def column(rows, name):
    return rows[..., VIEW_COLUMN[name]]


def in_window(rows, nuclei):
    """Whether some nucleus lies in each view's (turned) window, with rounding slack."""
    angle = np.deg2rad(column(rows, "angle_deg"))[..., None]
    dx, dy = np.moveaxis(nuclei - rows[..., None, :2], -1, 0)
    local_x = np.cos(angle) * dx + np.sin(angle) * dy
    local_y = np.cos(angle) * dy - np.sin(angle) * dx
    half = rows[..., None, 2:4] / 2 + 1e-3
    return ((np.abs(local_x) <= half[..., 0]) & (np.abs(local_y) <= half[..., 1])).any(-1)


@pytest.mark.parametrize("name", CROP_POLICIES)
@pytest.mark.parametrize("place", NUCLEI)
@pytest.mark.parametrize("rotation_deg", [0.0, 180.0])
def test_a_nucleus_is_inside_every_crop(name, place, rotation_deg):
    policy = replace(CROP_POLICIES[name], rotation_deg=rotation_deg, jitter=0.99)
    assert in_window(draw(policy, NUCLEI[place], 100), NUCLEI[place]).all()


@pytest.mark.parametrize("nuclei", [*NUCLEI.values(), np.zeros((0, 2)), np.array([[-4.0, 5.0]])])
def test_upright_crops_stay_in_the_tile(nuclei):
    rows = draw(CROP_POLICIES["dinov2"], nuclei)
    low, high = rows[..., :2] - rows[..., 2:4] / 2, rows[..., :2] + rows[..., 2:4] / 2
    assert low.min() >= -1e-3
    assert high.max() <= S + 1e-3


def test_turned_crops_stay_in_the_tile_when_they_can():
    policy = CropPolicy(rotation_deg=180.0, local_scale=(0.05, 0.2), num_global=1)
    rows = draw(policy, NUCLEI["middle"])[:, 1:]
    angle = np.deg2rad(column(rows, "angle_deg"))
    half_x, half_y = column(rows, "width_px") / 2, column(rows, "height_px") / 2
    reach = np.abs(np.cos(angle)) * half_x + np.abs(np.sin(angle)) * half_y
    assert (column(rows, "center_x_px") - reach).min() >= -1e-3
    assert (column(rows, "center_x_px") + reach).max() <= S + 1e-3


def test_scale_and_aspect_follow_the_policy():
    policy = CropPolicy(global_scale=(0.3, 0.6), local_scale=(0.05, 0.2))
    rows = draw(policy)
    area = column(rows, "width_px") * column(rows, "height_px") / S**2
    aspect = column(rows, "width_px") / column(rows, "height_px")
    assert area[:, :2].min() >= 0.3 - 1e-5
    assert area[:, :2].max() <= 0.6 + 1e-5
    assert area[:, 2:].min() >= 0.05 - 1e-5
    assert area[:, 2:].max() <= 0.2 + 1e-5
    np.testing.assert_allclose([area[:, :2].mean(), area[:, 2:].mean()], [0.45, 0.125], atol=0.02)
    assert aspect.min() >= 3 / 4 - 1e-4
    assert aspect.max() <= 4 / 3 + 1e-4
    np.testing.assert_allclose(np.log(aspect).mean(), 0, atol=0.02)


def test_nuclei_are_chosen_alike_and_jittered():
    nuclei = np.array([[40.0, 40.0], [88.0, 88.0], [-5.0, 64.0]])
    policy = CropPolicy(local_scale=(0.05, 0.1), jitter=0.5)
    rows = draw(policy, nuclei)[:, 2:]
    offset = rows[..., None, :2] - nuclei
    nearest = np.abs(offset).sum(-1).argmin(-1)
    counts = np.bincount(nearest.ravel(), minlength=3) / nearest.size
    np.testing.assert_allclose(counts, [0.5, 0.5, 0.0], atol=0.05)
    own = np.take_along_axis(offset, nearest[..., None, None], axis=-2)[..., 0, :]
    share = np.abs(own) / (rows[..., 2:4] / 2)
    assert share.max() <= 0.5 + 1e-4
    assert share.max() > 0.45


def test_random_centres_ignore_nuclei():
    policy = CropPolicy(centre="random")
    one = sample_views(NUCLEI["middle"], S, policy, tile_rng(0, 0, "a"))
    two = sample_views(np.zeros((0, 2)), S, policy, tile_rng(0, 0, "a"))
    np.testing.assert_array_equal(one, two)
    assert not in_window(draw(policy)[:, 2:], NUCLEI["middle"]).all()


def test_nuclei_change_places_but_no_other_draw():
    one = sample_views(NUCLEI["many"], S, CropPolicy(), tile_rng(0, 0, "a"))
    two = sample_views(np.zeros((0, 4)), S, CropPolicy(), tile_rng(0, 0, "a"))
    np.testing.assert_array_equal(one[:, 2:], two[:, 2:])
    assert (one[:, :2] != two[:, :2]).any()


def test_augmentations_follow_their_chances():
    rows = draw(CROP_POLICIES["dinov2"], tiles=600)
    blurred = column(rows, "blur_sigma_px") > 0
    np.testing.assert_allclose(blurred[:, 0].mean(), 1.0)
    np.testing.assert_allclose(blurred[:, 1].mean(), 0.1, atol=0.04)
    np.testing.assert_allclose(blurred[:, 2:].mean(), 0.5, atol=0.03)
    solarized = column(rows, "solarize")
    assert solarized[:, 0].max() == 0
    np.testing.assert_allclose(solarized[:, 1].mean(), 0.2, atol=0.05)
    assert solarized[:, 2:].max() == 0
    np.testing.assert_allclose(column(rows, "gray").mean(), 0.2, atol=0.03)
    np.testing.assert_allclose((column(rows, "brightness") != 1).mean(), 0.8, atol=0.03)
    np.testing.assert_allclose(column(rows, "flip").mean(), 0.5, atol=0.03)
    turns = np.bincount(column(rows, "quarter_turns").astype(int).ravel(), minlength=4)
    np.testing.assert_allclose(turns / turns.sum(), 0.25, atol=0.03)
    for name, span in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
        assert np.abs(column(rows, name) - 1).max() <= span
    assert np.abs(column(rows, "hue")).max() <= 0.1
    assert column(rows, "blur_sigma_px").max() <= 2.0


def test_everything_off_is_a_plain_crop():
    policy = CropPolicy(
        quarter_turns=False,
        flips=False,
        color_prob=0.0,
        gray_prob=0.0,
        global_blur_prob=(0.0,),
        local_blur_prob=0.0,
        global_solarize_prob=(0.0,),
    )
    rows = sample_views(NUCLEI["many"], S, policy, tile_rng(0, 0, "a"))
    plain = identity_views(S, policy.num_views)
    np.testing.assert_array_equal(rows[:, 4:], plain[:, 4:])


def test_rows_have_the_contracts_shape_and_repeat():
    one = sample_views(NUCLEI["many"], S, CropPolicy(), tile_rng(3, 1, "a"))
    two = sample_views(NUCLEI["many"], S, CropPolicy(), tile_rng(3, 1, "a"))
    assert one.shape == (10, NUM_VIEW_PARAMS)
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ["simclr", "moco", "byol"])
def test_contrastive_policies_have_two_views_of_one_scale(name):
    policy = CROP_POLICIES[name]
    assert (policy.num_global, policy.num_local) == (2, 0)
    rows = draw(policy)
    area = column(rows, "width_px") * column(rows, "height_px")
    np.testing.assert_allclose(area[:, 0].mean(), area[:, 1].mean(), rtol=0.15)


def test_unicas_scales_are_the_default():
    policy = CROP_POLICIES["dinov2"]
    assert (policy.num_global, policy.num_local) == (2, 8)
    assert policy.global_scale == (0.5, 1.0)
    assert policy.local_scale == (0.05, 0.5)


def test_all_problems_are_listed_at_once():
    with pytest.raises(InputError) as caught:
        CropPolicy(global_scale=(0.9, 0.2), local_scale=(0.1, 2.0), hue=0.7, gray_prob=1.5)
    assert len(caught.value.problems) == 4
    with pytest.raises(InputError, match="nucleus, random"):
        CropPolicy(centre="cell")


def test_lists_from_yaml_are_taken():
    policy = CropPolicy(global_scale=[0.5, 1.0], global_blur_prob=[1.0, 0.1])  # pyright: ignore
    assert policy == CropPolicy()
    assert hash(policy) == hash(CropPolicy())
