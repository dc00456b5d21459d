import io

import numpy as np
import pytest
from PIL import Image

from cytoray.report import encode_jpeg, qc_images
from cytoray.report.slide_images import blend_density, fade_background, resize_mask


def decode(data):
    assert data.startswith(b"\xff\xd8\xff")
    return np.asarray(Image.open(io.BytesIO(data)))


def test_three_small_jpegs():
    rng = np.random.default_rng(0)
    thumbnail = rng.integers(0, 256, (600, 1500, 3), dtype=np.uint8)
    images = qc_images(thumbnail, np.ones((6, 15), bool), np.array([[1400.0, 30.0]]), max_px=300)
    assert list(images) == ["thumbnail", "foreground", "density"]
    assert {decode(data).shape for data in images.values()} == {(120, 300, 3)}
    color = np.ptp(decode(images["density"]).astype(int), axis=2)
    row, column = np.unravel_index(color.argmax(), color.shape)
    assert (column, row) == (pytest.approx(280, abs=25), pytest.approx(6, abs=25))


def test_noise_is_encoded_too():
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    assert decode(encode_jpeg(noise, quality=95)).shape == (900, 900, 3)


def test_small_thumbnails_are_not_enlarged_and_empty_input_is_fine():
    thumbnail = np.full((3, 5, 3), 200, np.uint8)
    images = qc_images(thumbnail, np.zeros((3, 5), bool), np.zeros((0, 2)))
    assert decode(images["density"]).shape == (3, 5, 3)


def test_background_is_bleached_foreground_kept():
    rgb = np.full((40, 40, 3), (200, 40, 90), np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    faded = fade_background(rgb, mask)
    assert faded[20, 20].tolist() == [200, 40, 90]
    assert np.ptp(faded[2, 2].astype(int)) == 0
    assert faded[10, 20].tolist() == [0, 114, 178]


def test_mask_is_resized_without_grey():
    mask = np.array([[True, False], [False, False]])
    big = resize_mask(mask, (10, 8))
    assert big.shape == (10, 8)
    assert big.sum() == 20
    assert big[:5, :4].all()


def test_density_without_nuclei_is_grey():
    rgb = np.full((30, 30, 3), (10, 200, 60), np.uint8)
    assert np.ptp(blend_density(rgb, np.zeros((0, 2))).astype(int), axis=2).max() == 0
    outside = blend_density(rgb, np.array([[-5.0, 3.0], [400.0, 2.0]]))
    assert np.ptp(outside.astype(int), axis=2).max() == 0
