import pickle

import numpy as np
import openslide
import pytest
from PIL import Image

from cytoray.errors import InputError, SlideError
from cytoray.slides.jpeg_tiles import TILE_DECODERS
from cytoray.slides.reader import open_slide
from cytoray.slides.readers_openslide import OpenSlideReader, flatten_alpha
from cytoray.slides.readers_tiff import TiffReader

from .conftest import cell_picture, damage_tile


def code_of(path, **options) -> str:
    with pytest.raises(SlideError) as caught:
        open_slide(str(path), **options)
    return caught.value.code


@pytest.mark.parametrize("photometric", ["ycbcr", "rgb"])
@pytest.mark.parametrize("decoder", sorted(TILE_DECODERS))
def test_fast_reader_gives_openslides_pixels(make_slide, photometric, decoder):
    path = str(make_slide(photometric=photometric))
    reference = OpenSlideReader(path)
    fast = TiffReader(path, reference.info, decoder=decoder)
    slide = openslide.OpenSlide(path)
    for level, (width, height) in enumerate(slide.level_dimensions):
        expected = np.asarray(slide.read_region((0, 0), level, (width, height)))
        np.testing.assert_array_equal(
            fast.read_level(level, 0, 0, width, height), expected[..., :3]
        )
    part = fast.read_level(0, 201, 333, 517, 401)
    expected = np.asarray(slide.read_region((201, 333), 0, (517, 401)))[..., :3]
    np.testing.assert_array_equal(part, expected)


def test_ladder_prefers_the_fast_reader_and_says_why(make_slide):
    with open_slide(str(make_slide())) as slide:
        assert slide.info.reader == "tiff"
        assert "compared" in slide.info.reader_reason
        assert slide.info.level_dimensions == ((1500, 1200), (750, 600), (375, 300))
        assert slide.info.level_downsamples == (1.0, 2.0, 4.0)
        assert slide.info.mpp_x == pytest.approx(0.25)
        assert slide.info.vendor == "generic-tiff"


def test_other_compression_steps_down_to_openslide(make_slide):
    path = str(make_slide(compression="deflate", photometric="rgb", levels=1))
    with open_slide(path) as slide:
        assert slide.info.reader == "openslide"
        assert "not JPEG" in slide.info.reader_reason
    assert code_of(path, reader="tiff") == "reader_unfit"


def test_aperio_description_gives_objective_and_mpp(make_slide):
    text = "Aperio Image Library v12\r\n1500x1200 (256x256) JPEG/RGB Q=90|AppMag = 20|MPP = 0.499"
    with open_slide(str(make_slide("a.svs", description=text, mpp=None))) as slide:
        assert slide.info.vendor == "aperio"
        assert slide.info.objective_power == 20.0
        assert slide.info.mpp_x == pytest.approx(0.499)


def test_odd_levels_keep_whole_downsamples(make_slide):
    with open_slide(str(make_slide(width=1503, height=1201))) as slide:
        assert slide.info.level_dimensions[1] == (751, 600)
        assert slide.info.level_downsamples == (1.0, 2.0, 4.0)


@pytest.mark.parametrize("reader", ["openslide", "tiff"])
def test_a_damaged_tile_is_an_error_and_the_rest_stays_readable(make_slide, reader):
    path = make_slide()
    damage_tile(path, 8)
    with open_slide(str(path), reader=reader) as slide:
        with pytest.raises(SlideError) as caught:
            slide.read_level(0, 500, 256, 300, 200)
        assert caught.value.code == "decode_error"
        assert caught.value.region
        assert slide.read_level(0, 0, 0, 256, 256).mean() > 100
        with pytest.raises(SlideError):
            slide.read_level(0, 512, 256, 256, 256)


@pytest.mark.parametrize("decoder", sorted(TILE_DECODERS))
@pytest.mark.parametrize("start", [0.0, 0.4])
def test_decoders_notice_lost_data(make_slide, decoder, start):
    path = make_slide()
    damage_tile(path, 0, start=start)
    fast = TiffReader(str(path), OpenSlideReader(str(path)).info, decoder=decoder)
    with pytest.raises(SlideError):
        fast.read_level(0, 0, 0, 10, 10)


@pytest.mark.parametrize("decoder", sorted(TILE_DECODERS))
def test_true_mid_grey_is_no_damage(make_slide, decoder):
    grey = np.full((512, 512, 3), 128, np.uint8)
    path = make_slide(pixels=grey, levels=1)
    fast = TiffReader(str(path), OpenSlideReader(str(path)).info, decoder=decoder)
    assert (fast.read_level(0, 0, 0, 512, 512) == 128).all()


def test_tile_cache_is_bounded_and_right(make_slide):
    path = str(make_slide())
    info = OpenSlideReader(path).info
    small = TiffReader(path, info, cache_bytes=2 * 256 * 256 * 3)
    whole = small.read_level(0, 0, 0, 1500, 1200)
    assert len(small._cache) <= 2
    np.testing.assert_array_equal(small.read_level(0, 100, 90, 900, 800), whole[90:890, 100:1000])


def test_truncated_file(make_slide, tmp_path):
    data = make_slide().read_bytes()
    path = tmp_path / "cut.tiff"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SlideError) as caught, open_slide(str(path)) as slide:
        slide.read_level(0, 0, 0, *slide.info.level_dimensions[0])
    assert caught.value.code in {"truncated", "decode_error", "not_a_slide"}
    path.write_bytes(b"II*\x00\xff\xff\x00\x00" + bytes(100))
    assert code_of(path) == "truncated"


def test_what_is_no_slide(tmp_path):
    assert code_of(tmp_path / "none.svs") == "missing_file"
    empty = tmp_path / "empty.svs"
    empty.touch()
    assert code_of(empty) == "empty_file"
    text = tmp_path / "text.svs"
    text.write_text("not a slide at all, sixteen bytes and more")
    assert code_of(text) == "not_a_slide"
    assert code_of(tmp_path) == "not_a_slide"
    with pytest.raises(InputError, match="openslide"):
        open_slide(str(text), reader="vips")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_picture_as_slide(tmp_path, suffix):
    picture = cell_picture(400, 300)
    path = tmp_path / f"field.{suffix}"
    Image.fromarray(picture).save(path, dpi=(72, 72)) if suffix != "bmp" else Image.fromarray(
        picture
    ).save(path)
    with open_slide(str(path)) as slide:
        assert slide.info.reader == "image"
        assert slide.info.mpp_x is None
        np.testing.assert_array_equal(slide.read_level(0, 10, 20, 50, 60), picture[20:80, 10:60])


def test_damaged_picture(tmp_path):
    path = tmp_path / "field.png"
    Image.fromarray(cell_picture(400, 300)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    assert code_of(path) == "decode_error"
    path.write_bytes(b"no picture")
    assert code_of(path) == "not_a_slide"


def test_thumbnail_has_the_slides_proportions(make_slide):
    with open_slide(str(make_slide())) as slide:
        small = slide.thumbnail(100)
        assert small.shape == (80, 100, 3)
        whole = slide.read_level(0, 0, 0, 1500, 1200)
        assert np.abs(small.mean(axis=(0, 1)) - whole.mean(axis=(0, 1))).max() < 3
        assert slide.thumbnail(5000).shape == whole.shape


def test_reading_outside_is_a_mistake(make_slide):
    with open_slide(str(make_slide())) as slide, pytest.raises(ValueError, match="not inside"):
        slide.read_level(0, 1400, 0, 200, 10)


def test_readers_do_not_travel(make_slide):
    with open_slide(str(make_slide())) as slide:
        with pytest.raises(TypeError, match="picklable"):
            pickle.dumps(slide)
        assert pickle.loads(pickle.dumps(slide.info)) == slide.info


def test_transparent_is_background():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[1, 1] = (100, 100, 100, 128)
    flat = flatten_alpha(rgba, (255, 255, 255))
    assert flat[0, 0].tolist() == [10, 20, 30]
    assert flat[0, 1].tolist() == [255, 255, 255]
    assert flat[1, 1].tolist() == [177, 177, 177]


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("slides/mosaic_000.svs", "tiff"),
        ("slides/mosaic_001.tiff", "tiff"),
        ("slides/lbc_fields_dev.svs", "tiff"),
        ("slides_histology/cmu-1-small-region.svs", "tiff"),
        ("slides_histology/tcga-cr-7395-01a-01-ts1.svs", "openslide"),
    ],
)
def test_real_slides(real_data, name, reader):
    path = str(real_data / name)
    with open_slide(path) as slide, open_slide(path, reader="openslide") as reference:
        assert slide.info.reader == reader
        for level, (width, height) in enumerate(slide.info.level_dimensions):
            if not (slide.info.width_px_level0 / width).is_integer():
                continue
            x, y = width // 3, height // 3
            region = (level, x, y, min(700, width - x), min(500, height - y))
            np.testing.assert_array_equal(slide.read_level(*region), reference.read_level(*region))


@pytest.mark.parametrize("side", [600, 524, 640, 720])
def test_levels_hardly_larger_than_a_probe(make_slide, side):
    """The middle probe of a level of 131 to 180 px ends at the level's border."""
    with open_slide(str(make_slide(width=side, height=side))) as slide:
        assert slide.info.reader == "tiff"
