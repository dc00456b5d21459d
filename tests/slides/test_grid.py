import numpy as np
import pytest

from cytoray.errors import InputError, SlideError
from cytoray.slides.grid import (
    Grid,
    SlideGrid,
    bool_to_mask,
    chunk_id,
    mask_indices,
    mask_to_bool,
    parse_tile_id,
    tile_id,
)


def layout(width=5000, height=4300, mpp=0.25, **grid):
    return SlideGrid(
        grid=Grid(**grid), width_px_level0=width, height_px_level0=height, mpp_x=mpp, mpp_y=mpp
    )


def test_grid_lists_all_problems():
    with pytest.raises(InputError) as caught:
        Grid(tile_px=4, mpp=-1)
    assert len(caught.value.problems) == 2


def test_only_whole_tiles_exist():
    slide = layout()
    assert (slide.width_px, slide.height_px) == (2500, 2150)
    assert (slide.tile_columns, slide.tile_rows) == (11, 9)
    assert (slide.chunk_columns, slide.chunk_rows, slide.num_chunks) == (2, 2, 4)
    assert slide.chunk_tiles(1, 1) == (3, 1)
    assert slide.valid_mask(1, 1) == 0b111
    assert list(slide.chunks()) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    with pytest.raises(IndexError):
        slide.chunk_tiles(2, 0)


def test_rounding_does_not_lose_a_tile():
    exact = SlideGrid(
        grid=Grid(tile_px=224, mpp=0.3),
        width_px_level0=672,
        height_px_level0=672,
        mpp_x=0.1,
        mpp_y=0.1,
    )
    assert exact.num_tiles == 1


def test_tile_positions_are_inverse_and_in_level0():
    slide = layout()
    for column in range(slide.tile_columns):
        for row in range(slide.tile_rows):
            place = slide.locate_tile(column, row)
            assert slide.tile_position(*place) == (column, row)
            assert slide.tile_origin_level0(*place) == (column * 448.0, row * 448.0)
    xy = np.array([[10.5, 20.25]])
    np.testing.assert_allclose(slide.level0_to_px(slide.px_to_level0(xy)), xy)


def test_keep_masks_round_trip():
    slide = layout()
    rng = np.random.default_rng(0)
    shares = rng.random((slide.tile_rows, slide.tile_columns))
    masks = slide.chunk_keep_masks(shares, 0.5)
    np.testing.assert_array_equal(slide.keep_array(masks), shares >= 0.5)
    for (column, row), mask in zip(slide.chunks(), masks, strict=True):
        assert mask & ~slide.valid_mask(column, row) == 0
        for index in mask_indices(mask):
            x, y = slide.tile_position(column, row, int(index))
            assert shares[y, x] >= 0.5
    everything = slide.chunk_keep_masks(np.ones_like(shares), 0.0)
    assert everything == [slide.valid_mask(*chunk) for chunk in slide.chunks()]


def test_masks_and_bools():
    keep = np.zeros(64, bool)
    keep[[0, 5, 63]] = True
    mask = bool_to_mask(keep)
    assert mask == 1 | 1 << 5 | 1 << 63
    np.testing.assert_array_equal(mask_to_bool(mask), keep)
    np.testing.assert_array_equal(mask_indices(mask), [0, 5, 63])


def test_ids():
    chunk = chunk_id("slide 1", Grid(), 3, 12)
    assert chunk == "slide 1:0.5:224:3_12"
    assert parse_tile_id(tile_id(chunk, 9)) == ("slide 1", Grid(), 3, 12, 9)
    with pytest.raises(ValueError, match="not a tile id"):
        parse_tile_id("nonsense")


@pytest.mark.parametrize(
    ("options", "code"), [({"width": 400}, "too_small"), ({"mpp": 1.2}, "mpp_too_coarse")]
)
def test_slides_that_cannot_be_tiled(options, code):
    with pytest.raises(SlideError) as caught:
        layout(**options)
    assert caught.value.code == code
