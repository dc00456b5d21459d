import io

import numpy as np
import pytest
from PIL import Image

from cytoray.report import encode_jpeg, focus_image, qc_images
from cytoray.report.slide_images import (
    blend_density,
    blend_focus,
    fade_background,
    resize_mask,
)


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


def test_focus_is_a_fourth_picture_when_it_was_measured():
    thumbnail = np.full((60, 120, 3), 220, np.uint8)
    scores = np.array([[0.0, 1.0, np.nan], [1.0, 0.5, 0.0]])
    mask = np.ones((6, 12), bool)
    plain = qc_images(thumbnail, mask, np.zeros((0, 2)))
    images = qc_images(thumbnail, mask, np.zeros((0, 2)), focus=scores)
    assert list(images) == [*plain, "focus"]
    assert images["focus"] == focus_image(scores, thumbnail)
    shown = decode(images["focus"]).astype(int)
    assert shown.shape == (60, 120, 3)
    blurred, sharp, unknown = shown[15, 20], shown[15, 60], shown[15, 100]
    assert blurred[2] > blurred[1]  # purple
    assert sharp[0] > sharp[2] + 80  # yellow
    assert np.ptp(unknown) < 6  # grey
    assert np.array_equal(shown[45, 20] // 16, sharp // 16)


def test_focus_tiles_lie_where_the_tiles_are():
    rgb = np.full((50, 100, 3), 200, np.uint8)
    colored = np.ptp(blend_focus(rgb, np.ones((2, 4)), (80.0, 40.0)).astype(int), axis=2) > 0
    assert colored[:40, :80].all()
    assert not colored[40:].any()
    assert not colored[:, 80:].any()
    assert not np.ptp(blend_focus(rgb, np.zeros((0, 0))).astype(int), axis=2).any()
    with pytest.raises(ValueError, match="tile_rows"):
        blend_focus(rgb, np.ones(3))
