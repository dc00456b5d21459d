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
from cytoray.synthetic import SynthConfig
from cytoray.synthetic import make_slide as generate


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


def scene(size: int, seed: int = 0, cells_per_px: float = 3e-4) -> tuple[np.ndarray, np.ndarray]:
    """A slide at 4 um/px with pale cells, dark small ones and two thick groups; and where they are.

    Returns:
        uint8 (size, size, 3), bool (size, size).
    """
    rng = np.random.default_rng(seed)
    picture = np.full((size, size, 3), (232, 234, 238), np.uint8)
    truth = np.zeros((size, size), np.uint8)
    looks = [((205, 215, 225), 6), ((225, 200, 205), 6), ((180, 185, 215), 4), ((95, 75, 140), 3)]
    for x, y in rng.integers(0, size, (int(cells_per_px * size * size), 2)).tolist():
        colour, radius = looks[rng.integers(len(looks))]
        cv2.circle(picture, (x, y), radius, colour, -1)
        cv2.circle(picture, (x, y), 1, (90, 70, 140), -1)
        cv2.circle(truth, (x, y), radius, 1, -1)
    for centre in rng.integers(size // 4, 3 * size // 4, (2, 2)):
        for x, y in rng.normal(centre, size / 60, (120, 2)).astype(int).tolist():
            cv2.circle(picture, (x, y), 5, (150, 140, 190), -1)
            cv2.circle(picture, (x, y), 2, (70, 50, 115), -1)
            cv2.circle(truth, (x, y), 5, 1, -1)
    return picture, truth.astype(bool)


def photographed(picture: np.ndarray, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 1.5, picture.shape)
    return np.clip(cv2.GaussianBlur(picture, (0, 0), 0.6) + noise, 0, 255).astype(np.uint8)


def ring(picture: np.ndarray) -> None:
    size = len(picture)
    cv2.circle(picture, (size // 2, size // 2), int(0.45 * size), (122, 126, 130), 5, cv2.LINE_AA)


def wide_ring_partly_outside(picture: np.ndarray) -> None:
    size = len(picture)
    centre, radius = (size // 2, int(1.3 * size)), int(1.1 * size)
    cv2.circle(picture, centre, radius, (150, 152, 155), 40, cv2.LINE_AA)


def bubbles(picture: np.ndarray) -> None:
    size = len(picture)
    cv2.circle(picture, (size // 3, size // 3), 110, (95, 100, 104), 6, cv2.LINE_AA)
    cv2.circle(picture, (2 * size // 3, size // 2), 34, (95, 100, 104), 3, cv2.LINE_AA)


def coverslip_edge(picture: np.ndarray) -> None:
    size = len(picture)
    cv2.line(picture, (int(0.86 * size), 0), (int(0.9 * size), size), (130, 130, 134), 5)


def dark_outside_of_a_well(picture: np.ndarray) -> None:
    size = len(picture)
    outside = np.ones(picture.shape[:2], np.uint8)
    cv2.circle(outside, (size // 2, size // 2), int(0.52 * size), 0, -1)
    picture[outside > 0] = (160, 165, 168)


PAINTERS = [ring, wide_ring_partly_outside, bubbles, coverslip_edge, dark_outside_of_a_well]


@pytest.mark.parametrize("paint", PAINTERS)
def test_what_is_no_cell_is_left_out_and_cells_stay(paint):
    clean, cells = scene(1000)
    dirty = clean.copy()
    paint(dirty)
    painted = (dirty != clean).any(axis=2)
    away = cv2.dilate(painted.astype(np.uint8), np.ones((13, 13), np.uint8)) == 0
    mask = foreground_mask(photographed(dirty), 4.0)
    before = foreground_mask(photographed(clean), 4.0)
    assert painted.sum() > 800
    assert mask[painted & ~cells].mean() < 0.06
    kept = before & cells & away
    assert mask[kept].mean() > 0.985


@pytest.mark.parametrize(
    "ink", [(20, 60, 170), (25, 130, 60), (25, 25, 30), (45, 45, 50), (200, 30, 40)]
)
def test_ink_of_any_colour_is_left_out(ink):
    clean, cells = scene(700)
    dirty = clean.copy()
    cv2.line(dirty, (90, 560), (610, 430), ink, 110)
    painted = (dirty != clean).any(axis=2)
    mask = foreground_mask(photographed(dirty), 4.0)
    assert mask[painted].mean() < 0.03
    away = cv2.dilate(painted.astype(np.uint8), np.ones((41, 41), np.uint8)) == 0
    assert mask[foreground_mask(photographed(clean), 4.0) & cells & away].mean() > 0.985


def test_a_fibre_is_left_out():
    picture, _ = scene(600, cells_per_px=0)
    picture[:] = (232, 234, 238)
    along = np.linspace(0, 6, 200)
    points = np.stack([80 + 70 * along, 300 + 60 * np.sin(2 * along) + 25 * np.sin(5 * along)], 1)
    cv2.polylines(picture, [points.astype(np.int32)], False, (90, 110, 170), 3, cv2.LINE_AA)
    cv2.circle(picture, (300, 60), 6, (180, 185, 215), -1)
    mask = foreground_mask(photographed(picture), 4.0)
    assert mask[60, 300]
    assert not mask[150:450].any()


@pytest.mark.parametrize(("seed", "cells_per_px"), [(0, 3e-4), (1, 3e-3), (2, 1e-2)])
def test_cells_alone_are_never_lines(seed, cells_per_px):
    picture, cells = scene(700, seed, cells_per_px)
    mask = foreground_mask(photographed(picture), 4.0)
    inner = cv2.erode(cells.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    assert mask[inner].mean() > 0.98


def test_rows_strands_and_rosettes_of_cells_stay():
    picture = np.full((700, 900, 3), (232, 234, 238), np.uint8)
    rng = np.random.default_rng(3)
    for x in range(60, 840, 11):  # a row of cells, three millimetres long
        y = int(80 + rng.normal(0, 1.5))
        cv2.circle(picture, (x, y), int(rng.integers(4, 7)), (170, 165, 205), -1)
        cv2.circle(picture, (x, y), 2, (80, 60, 130), -1)
    for angle in np.linspace(0, 2 * np.pi, 22)[:-1]:  # cells around a lumen
        x, y = (int(v) for v in (200 + 40 * np.cos(angle), 300 + 40 * np.sin(angle)))
        cv2.circle(picture, (x, y), 8, (165, 160, 205), -1)
        cv2.circle(picture, (x, y), 3, (80, 60, 130), -1)
    cv2.ellipse(picture, (550, 450), (260, 110), 15, 0, 360, (205, 190, 215), -1)  # a sheet
    for x, y in rng.uniform((330, 370), (770, 530), (400, 2)).astype(int).tolist():
        if cv2.norm(np.array([x - 550.0, (y - 450.0) * 2.4])) < 250:
            cv2.circle(picture, (x, y), 2, (110, 95, 160), -1)
    stained = (picture != (232, 234, 238)).any(axis=2)
    mask = foreground_mask(photographed(picture), 4.0)
    assert mask[stained].mean() > 0.95


def test_pale_cells_are_found_among_paler_dirt():
    picture = np.full((300, 300, 3), (206, 206, 204), np.uint8)
    rng = np.random.default_rng(0)
    for x, y in rng.integers(0, 300, (90, 2)).tolist():  # proteinaceous veil over a third of it
        cv2.circle(picture, (x, y), 12, (201, 201, 201), -1)
    for x, y in [(40, 40), (150, 200), (250, 90)]:
        cv2.circle(picture, (x, y), 7, (182, 188, 196), -1)
    mask = foreground_mask(photographed(picture), 4.0)
    for x, y in [(40, 40), (150, 200), (250, 90)]:
        assert mask[y - 4 : y + 5, x - 4 : x + 5].mean() > 0.9
    assert mask.mean() < 0.02


def test_generated_nuclei_lie_in_kept_tiles(make_slide):
    kept = total = 0
    for index in range(4):
        generated = generate(SynthConfig(num_slides=6, held_out=0, size_px=2048), index)
        path = make_slide(f"{index}.tiff", pixels=generated.pixels, photometric="rgb")
        grid = Grid()
        with open_slide(str(path)) as slide:
            layout = SlideGrid.of(grid, 2048, 2048, resolve_mpp(slide.info))
            keep = layout.keep_array(slide_foreground(slide, layout).keep_masks)
        xy = np.stack([generated.nuclei["x_level0"], generated.nuclei["y_level0"]], axis=1)
        columns, rows = (layout.level0_to_px(xy) // grid.tile_px).astype(int).T
        inside = (columns < layout.tile_columns) & (rows < layout.tile_rows)
        total += inside.sum()
        kept += keep[rows[inside], columns[inside]].sum()
    assert total > 300
    assert kept / total >= 0.99


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
    for row in manifest.iter_rows():
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
    assert total > 100
    assert kept / total >= 0.99
