"""Nuclei-Centred Perturbation as a switch."""

import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.perturb import CROP_POLICIES, PerturbConfig, sample_views, tile_rng

S = 64
POLICY = CROP_POLICIES["dino"]
NUCLEI = np.array([[10.0, 12.0], [50.0, 40.0]])


@pytest.fixture(scope="module")
def tile() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (S, S, 3), np.uint8)


def share_of_crops_on_a_nucleus(views: np.ndarray) -> float:
    offset = np.abs(views[:, None, :2] - NUCLEI)
    return float((offset <= views[:, None, 2:4] / 2 + 1e-3).all(axis=-1).any(axis=1).mean())


def views_of(config: PerturbConfig, tile: np.ndarray, seed: int):
    return config.views(tile, NUCLEI, POLICY, tile_rng(seed, 0, "a"), mpp=0.5)


@pytest.mark.parametrize(
    ("config", "changed", "centred"),
    [
        (PerturbConfig(radius_um=3.0), True, True),
        (PerturbConfig(radius_um=3.0, shuffle=False), False, True),
        (PerturbConfig(radius_um=3.0, enabled=False), False, False),
    ],
)
def test_pixels_and_centres_by_switch(tile, config, changed, centred) -> None:
    made = [views_of(config, tile, seed) for seed in range(20)]
    assert all((part.tile != tile).any() == changed for part in made)
    small = np.concatenate([part.views[POLICY.num_global :] for part in made])
    share = share_of_crops_on_a_nucleus(small)
    assert share == 1.0 if centred else share < 0.8


def test_off_is_the_published_crops_of_the_method(tile) -> None:
    off = views_of(PerturbConfig(enabled=False), tile, 3)
    no_nuclei = sample_views(np.zeros((0, 2)), S, POLICY, tile_rng(3, 0, "a"))
    np.testing.assert_array_equal(off.views, no_nuclei)


def test_the_radius_is_in_micrometres(tile) -> None:
    """Twice the um per pixel, half the pixels: less of the tile is kept."""
    config = PerturbConfig(radius_um=6.0, retain_fraction=(1.0, 1.0))
    kept = [
        (config.views(tile, NUCLEI, POLICY, tile_rng(0, 0, "a"), mpp=mpp).tile == tile)
        .all(axis=2)
        .mean()
        for mpp in (0.5, 1.0)
    ]
    assert kept[0] > 2 * kept[1]


def test_all_problems_at_once() -> None:
    with pytest.raises(InputError, match="radius_um") as caught:
        PerturbConfig(radius_um=0.0, retain_fraction=(0.8, 0.2))
    assert "retain_fraction" in str(caught.value)
