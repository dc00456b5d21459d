import cv2
import numpy as np
import pytest

from cytoray.errors import SlideError
from cytoray.slides.foreground import (
    background_rgb,
    foreground_mask,
    read_overview,
    slide_foreground,
    tile_shares,
)
from cytoray.slides.grid import Grid, SlideGrid
from cytoray.slides.mpp import resolve_mpp
from cytoray.slides.reader import open_slide


def field(background=(232, 234, 238), noise=2.0, shape=(300, 400), seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    picture = np.full((*shape, 3), background, np.float32) + rng.normal(0, noise, (*shape, 3))
    return picture.clip(0, 255).astype(np.uint8)


BACKGROUNDS = [(232, 234, 238), (250, 250, 250), (240, 225, 205), (195, 205, 200), (255, 255, 255)]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_sparse_pale_cells_are_found_on_any_tint(background):
    picture = field(background)
    truth = np.zeros(picture.shape[:2], np.uint8)
    for x, y in [(50, 50), (200, 120), (333, 260)]:
        cv2.circle(truth, (x, y), 7, 1, -1)
    pale = np.array(background) * (0.86, 0.9, 0.95)
    picture[truth > 0] = pale.astype(np.uint8)
    mask = foreground_mask(picture, mpp=4.0)
    assert mask[truth > 0].mean() > 0.85
    assert mask[cv2.dilate(truth, np.ones((7, 7))) == 0].mean() < 0.001
    assert np.abs(background_rgb(picture) - background).max() < 4


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
def test_an_empty_field_has_no_foreground(background, noise):
    assert foreground_mask(field(background, noise), mpp=4.0).mean() < 0.001


def test_white_never_scanned_and_black_borders_do_not_count():
    picture = field()
    picture[:, :150] = 255
    picture[:, 380:] = 0
    cv2.circle(picture, (250, 150), 10, (150, 120, 180), -1)
    mask = foreground_mask(picture, mpp=4.0)
    assert mask[150, 250]
    assert not mask[:, :150].any()
    assert not mask[:, 376:].any()
    assert mask.mean() < 0.01


def test_pen_strokes_are_left_out_and_dark_groups_are_kept():
    picture = field(shape=(500, 600))
    cv2.line(picture, (50, 100), (550, 60), (20, 60, 170), 90)
    rng = np.random.default_rng(0)
    for _ in range(150):
        x, y = rng.normal((300, 350), 30).astype(int)
        cv2.circle(picture, (int(x), int(y)), 6, (150, 140, 190), -1)
        cv2.circle(picture, (int(x), int(y)), 3, (60, 40, 110), -1)
    mask = foreground_mask(picture, mpp=4.0)
    assert not mask[60:100, 100:500].any()
    assert mask[330:370, 280:320].mean() > 0.8


def test_all_black_or_all_white_is_empty():
    for value in (0, 255):
        assert not foreground_mask(np.full((100, 100, 3), value, np.uint8), 4.0).any()


def test_tile_shares_weigh_parts_of_mask_pixels():
    layout = SlideGrid(
        grid=Grid(tile_px=100, mpp=0.5),
        width_px_level0=700,
        height_px_level0=500,
        mpp_x=0.5,
        mpp_y=0.5,
    )
    mask = np.zeros((60, 80), bool)  # 4.5 um per pixel: a tile is 11.1 pixels
    mask[:, 5:] = True
    shares = tile_shares(mask, 4.5, 4.5, layout)
    assert shares.shape == (5, 7)
    np.testing.assert_allclose(shares[:, 0], 1 - 5 * 4.5 / 50, atol=1e-6)
    np.testing.assert_allclose(shares[:, 1:], 1.0)
    np.testing.assert_allclose(tile_shares(mask[:, ::-1], 4.5, 4.5, layout)[:, 0], 1.0)


def test_slide_foreground_keeps_tiles_with_cells(make_slide):
    picture = field(shape=(2000, 2400))
    cv2.circle(picture, (600, 500), 60, (150, 140, 190), -1)
    grid = Grid(tile_px=100, mpp=0.5)
    with open_slide(str(make_slide(pixels=picture))) as slide:
        layout = SlideGrid.of(grid, 2400, 2000, resolve_mpp(slide.info))
        found = slide_foreground(slide, layout)
        overview = read_overview(slide, 0.25, 0.25)
    assert overview.mpp_x == pytest.approx(4.0)
    assert overview.pixels.shape == (125, 150, 3)
    keep = layout.keep_array(found.keep_masks)
    assert keep[2, 2]
    assert keep[2, 3]
    assert found.num_tiles == keep.sum() <= 9
    assert 0.0005 < found.foreground_share < 0.01


def test_empty_slide_is_said_to_be_empty(make_slide):
    with open_slide(str(make_slide(pixels=field(shape=(1000, 1000))))) as slide:
        layout = SlideGrid.of(Grid(tile_px=100), 1000, 1000, resolve_mpp(slide.info))
        with pytest.raises(SlideError) as caught:
            slide_foreground(slide, layout)
    assert caught.value.code == "no_foreground"


@pytest.mark.real_data
def test_real_mosaics_cells_are_kept(real_data):
    import json

    from cytoray.slides.manifest import read_manifest

    manifest = read_manifest(real_data / "slides" / "manifest.csv")
    kept = total = 0
    for row in list(manifest.iter_rows())[:8]:
        with open_slide(row["path"]) as slide:
            mpp = resolve_mpp(slide.info, row["mpp"])
            layout = SlideGrid.of(Grid(), 4096, 4096, mpp)
            found = slide_foreground(slide, layout)
        assert 0.05 < found.foreground_share < 0.6
        for x, y, w, h in json.loads(row["abnormal_boxes_xywh"]):
            centre = layout.level0_to_px(np.array([x + w / 2, y + h / 2]))
            column, line = (centre // 224).astype(int)
            if column < layout.tile_columns and line < layout.tile_rows:
                total += 1
                kept += bool(layout.keep_array(found.keep_masks)[line, column])
    assert total > 10
    assert kept / total > 0.98
