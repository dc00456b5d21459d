import io

import numpy as np
import pytest
from PIL import Image

from cytoray.perturb import NUM_VIEW_PARAMS, VIEW_COLUMN
from cytoray.report import (
    attention_map,
    crop_outlines,
    foreground_overlay,
    nuclei_density,
    nuclei_overlay,
    view_grid,
    views_to_uint8,
)

VERMILION = (0xD5, 0x5E, 0x00)
BLUE = (0x00, 0x72, 0xB2)


def pixels(png):
    assert png.startswith(b"\x89PNG")
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert image.std() > 1, "the figure is blank"
    return image


def near(image, rgb):
    return np.abs(image.astype(int) - rgb).max(axis=2) < 40


@pytest.fixture
def field():
    return np.full((200, 300, 3), 235, np.uint8)


def test_nuclei_circles_are_where_the_nuclei_are(field):
    nuclei = np.array([[225.0, 50.0, 5.0, 0.9]])
    image = pixels(nuclei_overlay(field, nuclei, mpp=0.25, truth_xy_px=np.array([[75.0, 150.0]])))
    height, width = image.shape[:2]
    circle = np.argwhere(near(image[: int(height * 0.9)], VERMILION))
    assert circle.mean(axis=0) == pytest.approx([0.25 * height, 0.75 * width], rel=0.12)
    # Radius 5 um is 20 px of 300: the circle spans 40/300 of the image's width.
    assert np.ptp(circle[:, 1]) / width == pytest.approx(40 / 300, rel=0.2)
    cross = np.argwhere(near(image[: int(height * 0.9)], BLUE))
    assert cross.mean(axis=0) == pytest.approx([0.73 * height, 0.25 * width], rel=0.12)


def test_overlays_without_nuclei_and_of_large_images(field):
    pixels(nuclei_overlay(field, np.zeros((0, 4)), mpp=0.5, title="none"))
    pixels(nuclei_density(field, np.zeros((0, 2))))
    large = np.full((3000, 500, 3), 220, np.uint8)
    assert max(pixels(foreground_overlay(large, np.ones((30, 5), bool))).shape) < 3000


def test_foreground_and_density_change_the_picture(field):
    mask = np.zeros((20, 30), bool)
    mask[5:15, 5:25] = True
    assert near(pixels(foreground_overlay(field, mask)), BLUE).sum() > 100
    rng = np.random.default_rng(0)
    spread = pixels(nuclei_density(field, rng.normal((80, 100), 10, (300, 2))))
    assert (np.ptp(spread.astype(int), axis=2) > 60).mean() > 0.02


def test_wrong_images_are_refused(field):
    with pytest.raises(ValueError, match="uint8"):
        nuclei_overlay(field.astype(float), np.zeros((0, 4)), mpp=1.0)
    with pytest.raises(ValueError, match="uint8"):
        foreground_overlay(field[..., 0], np.ones((2, 2), bool))


def test_crop_outlines_follow_the_rotation():
    params = np.zeros((2, NUM_VIEW_PARAMS), np.float32)
    for name, value in {"center_x_px": 50, "center_y_px": 30, "width_px": 20}.items():
        params[:, VIEW_COLUMN[name]] = value
    params[:, VIEW_COLUMN["height_px"]] = 10
    params[1, VIEW_COLUMN["angle_deg"]] = 90
    straight, turned = crop_outlines(params)
    assert straight.tolist() == [[40, 25], [60, 25], [60, 35], [40, 35]]
    # A clockwise quarter turn on screen takes the top-left corner to the top right.
    assert turned == pytest.approx(np.array([[55, 20], [55, 40], [45, 40], [45, 20]]))


def test_view_grid_shows_kept_and_removed_nuclei():
    rng = np.random.default_rng(0)
    tile = rng.integers(150, 255, (64, 64, 3), dtype=np.uint8)
    row = {
        "original": tile,
        "perturbed": tile[::-1],
        "nuclei_xy_px": np.array([[20.0, 20.0], [40.0, 40.0]]),
        "radius_px": np.array([6.0, 6.0]),
        "retained": np.array([True, False]),
        "global_views": [tile, tile],
        "local_views": [tile[:32, :32]] * 6,
        "outlines": [[[2, 2], [40, 2], [40, 40], [2, 40]]],
    }
    bare = {key: row[key] for key in row if key not in ("radius_px", "retained", "outlines")}
    bare |= {"nuclei_xy_px": np.zeros((0, 2)), "local_views": []}
    image = pixels(view_grid([row, bare]))
    assert near(image, VERMILION).sum() > 30
    assert near(image, BLUE).sum() > 30
    assert image.shape[1] > 2.5 * image.shape[0]
    with pytest.raises(ValueError, match="at least one"):
        view_grid([])


def test_views_to_uint8_undoes_the_normalisation():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    views = np.moveaxis((tiles / 255 - mean) / std, -1, 1).astype(np.float32)
    assert np.array_equal(np.stack(views_to_uint8(views, mean, std)), tiles)


def test_attention_is_strongest_where_the_weights_are(field):
    xy = np.array([[x * 100.0, y * 100.0] for y in range(4) for x in range(6)])
    weights = np.arange(24.0)
    png = attention_map(
        field, xy, weights, 100, (600, 400), [field[:64, :64]] * 2, [23, 22], title="slide"
    )
    image = pixels(png)
    slide = image[:, : image.shape[1] // 3]
    violet = np.argwhere((slide[..., 2].astype(int) - slide[..., 1]) > 40)
    assert len(violet)
    assert violet[:, 0].mean() < image.shape[0] / 2, "the least attended tiles are at the top"
    pixels(attention_map(field, xy, np.zeros(24), 100, (600, 400)))
    pixels(attention_map(field, xy[:1], weights[:1], 100, (600, 400)))
