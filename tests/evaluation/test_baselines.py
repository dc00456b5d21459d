from __future__ import annotations

import numpy as np
import pytest
import torch

from cytoray.errors import InputError
from cytoray.evaluation.baselines import ColourHistogram, load_features_model


def test_a_histogram_counts_colours() -> None:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    images[0, :2] = (255, 0, 31)  # half of the pixels in bin (7, 0, 0)
    made = ColourHistogram()(torch.from_numpy(images))
    assert made.shape == (2, 512)
    expected = np.zeros((2, 512))
    expected[0, [0, 7 * 64]] = np.sqrt(0.5)
    expected[1, 0] = 1
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_it_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    counts, _ = np.histogramdd(image.reshape(-1, 3).astype(float), bins=8, range=[(0, 256)] * 3)
    made = ColourHistogram()(torch.from_numpy(image[None]))
    np.testing.assert_allclose(made[0], np.sqrt(counts.ravel() / 63), atol=1e-6)


def test_by_name() -> None:
    model = load_features_model("colour-histogram")
    assert (model.embed_dim, model.spec.img_px) == (512, 64)
    with pytest.raises(InputError, match="neither a folder"):
        load_features_model("colour-histograms")
    with pytest.raises(InputError, match="uint8"):
        model(torch.zeros(1, 4, 4, 3))
