import numpy as np
import pytest

from cytoray.synthetic.textures import (
    centre_distance,
    draw_fold,
    fill,
    fold_over,
    polygon_outline,
    ridges,
    round_outline,
    smooth_noise,
)


def test_smooth_noise_is_unit_and_as_coarse_as_asked():
    rng = np.random.default_rng(0)
    fine, coarse = (smooth_noise(rng, 256, 256, grain) for grain in (2.0, 20.0))
    assert fine.shape == (256, 256)
    assert fine.dtype == np.float32
    assert 0.6 < fine.std() < 1.4
    assert np.abs(np.diff(fine, axis=1)).mean() > 4 * np.abs(np.diff(coarse, axis=1)).mean()


def test_ridges_peak_where_noise_is_zero():
    values = ridges(np.array([[0.0, 1.0]], np.float32))
    assert values[0, 0] == 1
    assert values[0, 1] < 1e-6


@pytest.mark.parametrize("outline", [round_outline, polygon_outline])
def test_outlines_have_the_size_asked_for(outline):
    rng = np.random.default_rng(1)
    extra = (0.03,) if outline is round_outline else ()
    for _ in range(10):
        mask = fill(outline(rng, 40.0, 1.2, *extra) + 80, 160, 160)
        assert 0.75 < np.sqrt(mask.sum() / np.pi) / 40 < 1.3


def test_fold_over_makes_a_double_layer_and_moves_no_cytoplasm_outward():
    rng = np.random.default_rng(2)
    mask = fill(round_outline(rng, 40.0, 1.0, 0.01) + 50, 100, 100)
    layers = fold_over(rng, mask, 40.0)
    assert layers.max() == pytest.approx(2, abs=0.05)
    assert (layers[mask < 0.01] < 0.05).all()
    assert (layers > 0.5).sum() < (mask > 0.5).sum()


def test_draw_fold_is_thin():
    crease = draw_fold(np.random.default_rng(3), 120, 120, 50.0, 2.0)
    assert 0.2 < crease.max() <= 1
    assert (crease > 0.2).mean() < 0.1


def test_centre_distance_is_zero_in_the_middle():
    distance = centre_distance(5, 7)
    assert distance.shape == (5, 7)
    assert distance[2, 3] == 0
    assert distance[2, 0] == 3
