import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.mil.coarse import coarsen


def test_cells_are_the_mean_of_their_tiles():
    corners = np.array([[0, 0], [512, 0], [1024, 0], [0, 512], [1536, 1024]], np.float32)
    features = np.arange(10, dtype=np.float16).reshape(5, 2)
    coarse = coarsen(features, corners, 512.0)
    assert coarse.dtype == np.float32
    first = features[[0, 1, 3]].astype(np.float32).mean(0)
    assert np.allclose(coarse, [first, features[2], features[4]])
    assert np.allclose(coarsen(features, corners, 512.0, factor=8), [features.mean(0)])


def test_order_of_tiles_does_not_matter_and_nothing_is_lost():
    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(np.arange(7), np.arange(5)), -1).reshape(-1, 2) * 100.3
    features, order = rng.normal(size=(35, 3)), rng.permutation(35)
    straight = coarsen(features, corners, 100.3)
    assert straight.shape == (12, 3)
    assert np.allclose(straight, coarsen(features[order], corners[order], 100.3))


def test_what_does_not_fit_is_said():
    with pytest.raises(InputError, match="2 coordinates for 3 features"):
        coarsen(np.zeros((3, 2)), np.zeros((2, 2)), 1.0)
    with pytest.raises(InputError, match="must be positive"):
        coarsen(np.zeros((3, 2)), np.zeros((3, 2)), 0.0)
