import cv2
import numpy as np
import pytest

from cytoray.errors import SlideError
from cytoray.slides.chunks import Grid, SlideGrid, best_level, read_chunk, read_region_px
from cytoray.slides.mpp import ResolvedMpp, resolve_mpp
from cytoray.slides.reader import open_slide

from .conftest import damage_tile


def square(mpp: float) -> ResolvedMpp:
    return ResolvedMpp(mpp_x=mpp, mpp_y=mpp, source="file")


def dots(width: int, height: int, spacing: int = 190) -> tuple[np.ndarray, np.ndarray]:
    """A picture with soft dots, and their centres (n, 2) in level-0 pixels (edge coordinates)."""
    picture = np.zeros((height, width), np.float32)
    centres = []
    ys, xs = np.mgrid[0:height, 0:width]
    for y in range(60, height - 60, spacing):
        for x in range(60, width - 60, spacing):
            cx, cy = x + (y % 7) * 0.13, y + (x % 5) * 0.17
            part = (slice(y - 30, y + 30), slice(x - 30, x + 30))
            squared = (xs[part] + 0.5 - cx) ** 2 + (ys[part] + 0.5 - cy) ** 2
            picture[part] += 200 * np.exp(-squared / (2 * 6.0**2))
            centres.append((cx, cy))
    return cv2.merge([picture.astype(np.uint8)] * 3), np.array(centres)


@pytest.mark.parametrize("mpp", [0.25, 0.26, 0.37, 0.5, 0.51, 0.75, 0.9, 0.2])
@pytest.mark.parametrize("levels", [1, 3])
def test_positions_hold_across_the_slide(make_slide, mpp, levels):
    picture, centres = dots(2003, 1401)
    path = make_slide(pixels=picture, levels=levels, compression="deflate", photometric="rgb")
    grid = Grid(tile_px=32, mpp=mpp)
    checked, tolerance = 0, 0.2 if levels == 1 else 0.4
    with open_slide(str(path)) as slide:
        layout = SlideGrid.of(grid, 2003, 1401, square(0.25))
        for column, row in layout.chunks():
            chunk = read_chunk(slide, square(0.25), grid, column, row, halo_px=20)
            height, width = chunk.pixels.shape[:2]
            origin = np.array([chunk.origin_x_px, chunk.origin_y_px])
            local = layout.level0_to_px(centres) - origin
            reach = int(25 * 0.25 / mpp) + 2
            for x, y in local:
                if not (reach <= x < width - reach and reach <= y < height - reach):
                    continue
                left, top = int(x) - reach, int(y) - reach
                size = 2 * reach + 1
                patch = chunk.pixels[top : top + size, left : left + size, 0].astype(float)
                ys, xs = np.mgrid[0 : patch.shape[0], 0 : patch.shape[1]]
                found_x = (patch * (xs + 0.5)).sum() / patch.sum() + left
                found_y = (patch * (ys + 0.5)).sum() / patch.sum() + top
                # OpenSlide itself places odd-sized levels to a quarter of a pixel only.
                assert abs(found_x - x) < tolerance
                assert abs(found_y - y) < tolerance
                checked += 1
    assert checked >= 20


def test_scale_one_hands_on_the_raw_pixels(make_slide):
    with open_slide(str(make_slide(width=1100, height=900))) as slide:
        chunk = read_chunk(slide, square(0.25), Grid(tile_px=96, mpp=0.25), 1, 0, halo_px=10)
        assert (chunk.origin_x_px, chunk.origin_y_px) == (758, 0)
        height, width = chunk.pixels.shape[:2]
        np.testing.assert_array_equal(chunk.pixels, slide.read_level(0, 758, 0, width, height))
        half = read_chunk(slide, square(0.25), Grid(tile_px=96, mpp=0.5), 0, 0)
        np.testing.assert_array_equal(half.pixels, slide.read_level(1, 0, 0, 480, 384))
        tile = half.tile(9)
        np.testing.assert_array_equal(tile, half.pixels[96:192, 96:192])
        with pytest.raises(IndexError):
            half.tile(7)


def test_anisotropic_scale(make_slide):
    picture, centres = dots(1200, 900)
    path = make_slide(pixels=picture, levels=1, compression="deflate", photometric="rgb")
    mpp = ResolvedMpp(mpp_x=0.2, mpp_y=0.3, source="file")
    grid = Grid(tile_px=64, mpp=0.3)
    with open_slide(str(path)) as slide:
        layout = SlideGrid.of(grid, 1200, 900, mpp)
        chunk = read_chunk(slide, mpp, grid, 0, 0)
    x, y = layout.level0_to_px(centres)[1]
    patch = chunk.pixels[int(y) - 20 : int(y) + 21, int(x) - 20 : int(x) + 21, 0].astype(float)
    ys, xs = np.mgrid[0:41, 0:41]
    assert abs((patch * (xs + 0.5)).sum() / patch.sum() + int(x) - 20 - x) < 0.25
    assert abs((patch * (ys + 0.5)).sum() / patch.sum() + int(y) - 20 - y) < 0.25


@pytest.mark.parametrize("mpp", [0.3, 0.5, 0.7, 1.9])
def test_neighbouring_chunks_agree_in_the_halo(make_slide, mpp):
    path = make_slide(width=2600, height=2400, levels=1)
    grid = Grid(tile_px=16, mpp=mpp)
    with open_slide(str(path)) as slide:
        left = read_chunk(slide, square(0.25), grid, 0, 0, halo_px=12)
        right = read_chunk(slide, square(0.25), grid, 1, 0)
    strip = left.pixels[:128, 128:140].astype(int)
    assert np.abs(strip - right.pixels[:128, :12]).max() <= 2


def test_shrinking_does_not_alias(make_slide):
    checker = ((np.indices((1024, 1024)).sum(axis=0) % 2) * 255).astype(np.uint8)
    path = make_slide(
        pixels=cv2.merge([checker] * 3), levels=1, compression="deflate", photometric="rgb"
    )
    with open_slide(str(path)) as slide:
        for mpp in (0.5, 0.6, 0.83, 1.1):
            chunk = read_chunk(slide, square(0.25), Grid(tile_px=24, mpp=mpp), 0, 0)
            assert np.abs(chunk.pixels[4:-4, 4:-4].astype(int) - 127).max() < 20


@pytest.mark.parametrize("mpp", [0.25, 0.3])
@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_damage_costs_only_the_tiles_it_touches(make_slide, reader, mpp):
    path = make_slide(width=1600, height=1400, levels=1)
    grid = Grid(tile_px=128, mpp=mpp)
    with open_slide(str(path)) as slide:
        whole = read_chunk(slide, square(0.25), grid, 0, 0, halo_px=16)
    assert whole.bad_tiles == {}
    damage_tile(path, 8)  # column 1, row 1 of 7 columns: level-0 pixels 256..512 both ways
    with open_slide(str(path), reader=reader) as slide:
        layout = SlideGrid.of(grid, 1600, 1400, square(0.25))
        chunk = read_chunk(slide, square(0.25), grid, 0, 0, halo_px=16)
    expected = set()
    side = 128 * mpp / 0.25
    for index in range(64):
        x, y = layout.tile_origin_level0(0, 0, index)
        if x < 512 and x + side > 256 and y < 512 and y + side > 256:
            expected.add(index)
    assert set(chunk.bad_tiles) == expected
    for index in range(64):
        if index in expected:
            x, y = chunk.tile_offset(index)
            assert not chunk.pixels[y : y + 128, x : x + 128].any()
            with pytest.raises(KeyError):
                chunk.tile(index)
        else:
            assert np.abs(chunk.tile(index).astype(int) - whole.tile(index)).max() < 60


def test_best_level(make_slide):
    with open_slide(str(make_slide(levels=3))) as slide:
        assert [best_level(slide.info, s) for s in (0.5, 1, 1.9, 1.99, 2, 3.9, 4, 100)] == [
            0, 0, 0, 1, 1, 1, 2, 2,
        ]  # fmt: skip


def test_region_needs_a_readable_slide(make_slide):
    path = make_slide(levels=1)
    damage_tile(path, 0)
    with open_slide(str(path)) as slide:
        layout = SlideGrid.of(Grid(tile_px=64, mpp=0.5), 1500, 1200, square(0.25))
        with pytest.raises(SlideError):
            read_region_px(slide, layout, 0, 0, 100, 100)
        assert read_region_px(slide, layout, 200, 100, 70, 50).shape == (50, 70, 3)


@pytest.mark.real_data
def test_real_scale_is_exact(real_data):
    path = str(real_data / "slides_histology" / "cmu-1-small-region.svs")
    with open_slide(path) as slide:
        mpp = resolve_mpp(slide.info)
        assert mpp.mpp_x == pytest.approx(0.499)
        chunk = read_chunk(slide, mpp, Grid(tile_px=224, mpp=0.998), 0, 0)
        raw = slide.read_level(0, 0, 0, 1792, 2688)
    halved = cv2.resize(raw, (896, 1344), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(chunk.pixels, halved)


@pytest.mark.real_data
def test_real_slide_without_scale(real_data):
    path = str(real_data / "slides_histology" / "tcga-cr-7395-01a-01-ts1.svs")
    with open_slide(path) as slide:
        with pytest.raises(SlideError) as caught:
            resolve_mpp(slide.info)
        assert caught.value.code == "mpp_missing"
        chunk = read_chunk(slide, resolve_mpp(slide.info, 0.5), Grid(tile_px=128, mpp=1.0), 0, 0)
        assert chunk.pixels.shape == (1024, 1024, 3)
        assert not chunk.bad_tiles
        # An odd level 0 was halved without its last row: whole downsamples fit, quotients do not.
        finest, level1 = (
            cv2.cvtColor(slide.read_level(*region), cv2.COLOR_RGB2GRAY).astype(np.float32)
            for region in [(0, 3400, 1200, 800, 800), (1, 1700, 600, 400, 400)]
        )
    halved = cv2.resize(finest, (400, 400), interpolation=cv2.INTER_AREA)
    window = cv2.createHanningWindow((400, 400), cv2.CV_32F)
    shift, _ = cv2.phaseCorrelate(halved, level1, window)
    # A quotient of 4443 / 2221 would shift x by 0.38 px here.
    assert abs(shift[0]) < 0.15


def test_tiles_come_as_one_block(make_slide):
    with open_slide(str(make_slide(width=1100, height=900))) as slide:
        chunk = read_chunk(slide, square(0.25), Grid(tile_px=96, mpp=0.25), 0, 0, halo_px=7)
    block = chunk.tiles([0, 9, 63])
    assert block.shape == (3, 96, 96, 3)
    np.testing.assert_array_equal(block[1], chunk.pixels[96:192, 96:192])
    np.testing.assert_array_equal(block[2], chunk.tile(63))
