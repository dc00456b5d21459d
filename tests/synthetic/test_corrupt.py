import numpy as np
import openslide
import pytest

from cytoray.errors import InputError
from cytoray.synthetic import (
    anucleate_slide,
    blank_slide,
    corrupt_tile,
    not_a_slide,
    plan_slides,
    strip_mpp,
    truncate,
    zero_bytes,
)


@pytest.fixture(params=["aperio", "generic"])
def good(request, config, folder):
    plan = next(plan for plan in plan_slides(config) if plan.layout == request.param)
    return folder / plan.path


def _pixels(path, size_px: int = 1024) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        region = slide.read_region((0, 0), 0, (size_px, size_px)).convert("RGB")
    return np.asarray(region, np.int16)


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
def test_truncated_files_are_refused(good, tmp_path, fraction):
    bad = truncate(good, tmp_path / good.name, fraction)
    assert bad.stat().st_size == int(good.stat().st_size * fraction)
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(bad)


@pytest.mark.parametrize("make", [zero_bytes, not_a_slide])
def test_files_that_are_no_slides_are_not_recognised(tmp_path, make):
    bad = make(tmp_path / "new" / "bad.svs")
    assert openslide.OpenSlide.detect_format(bad) is None
    with pytest.raises(openslide.OpenSlideUnsupportedFormatError):
        openslide.OpenSlide(bad)


def test_one_corrupt_tile_fails_and_the_others_still_read(good, tmp_path):
    bad = corrupt_tile(good, tmp_path / good.name, 6)  # row 1, column 2 of 4
    with openslide.OpenSlide(good) as reference, openslide.OpenSlide(bad) as slide:
        for tile in [*range(6), *range(7, 16)]:
            corner = (tile % 4 * 256, tile // 4 * 256)
            expected = reference.read_region(corner, 0, (256, 256))
            assert slide.read_region(corner, 0, (256, 256)) == expected
        assert slide.read_region((0, 0), 1, (512, 512)) == reference.read_region(
            (0, 0), 1, (512, 512)
        )
        with pytest.raises(openslide.OpenSlideError):
            slide.read_region((2 * 256 + 100, 256 + 100), 0, (8, 8))


def test_corrupt_tile_refuses_a_tile_that_is_not_there(good, tmp_path):
    with pytest.raises(InputError, match="tiles 0 to 15"):
        corrupt_tile(good, tmp_path / good.name, 16)


def test_strip_mpp_leaves_pixels_and_no_scale(good, tmp_path):
    bare = strip_mpp(good, tmp_path / good.name)
    with openslide.OpenSlide(bare) as slide:
        for name in ("openslide.mpp-x", "openslide.mpp-y", "openslide.objective-power"):
            assert name not in slide.properties
        assert "MPP" not in slide.properties.get("tiff.ImageDescription", "")
        assert slide.level_count == 2
    np.testing.assert_array_equal(_pixels(bare), _pixels(good))


def test_blank_slide_is_all_glass(tmp_path):
    pixels = _pixels(blank_slide(tmp_path / "blank.svs", size_px=600), 600)
    assert pixels.min() > 180
    assert pixels.std(axis=(0, 1)).max() < 6


def test_anucleate_slide_has_cytoplasm_and_nothing_as_dark_as_a_nucleus(tmp_path):
    path = anucleate_slide(tmp_path / "cytoplasm.tiff", layout="generic")
    pixels = _pixels(path)
    glass = np.percentile(pixels, 95, axis=(0, 1))
    assert 0.1 < ((glass - pixels).max(axis=2) > 25).mean() < 0.9
    assert (pixels[..., 0] < 60).mean() < 0.002


def test_fraction_must_be_a_share(good, tmp_path):
    with pytest.raises(InputError, match="between 0 and 1"):
        truncate(good, tmp_path / "x.svs", 1.5)
