from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cytoray.errors import SlideError
from cytoray.nuclei import build_detector
from cytoray.slides import mpp_from_nuclei, open_slide
from cytoray.slides.mpp import MAX_RATIO_TO_ESTIMATE, resolve_mpp
from cytoray.slides.mpp_estimate import common_radius_px, foreground_regions, lasting_radii_px
from cytoray.synthetic import SynthConfig, blank_slide, make_slide, write_pyramid

from .conftest import damage_tile


@pytest.fixture
def make_file(request):
    return request.getfixturevalue("make_slide")  # the name is the generator's here


def estimate(path: Path | str) -> float:
    with open_slide(str(path)) as slide:
        return mpp_from_nuclei(slide, build_detector("classical"))


@pytest.mark.parametrize(("mpp", "size_px"), [(0.25, 1536), (0.5, 1024)])
def test_generated_slides_are_estimated_within_a_half_whatever_the_file_says(
    mpp, size_px, tmp_path
):
    config = SynthConfig(num_slides=1, held_out=0, size_px=size_px, mpp=mpp, seed=5)
    pixels = make_slide(config, 0).pixels
    path = write_pyramid(tmp_path / "a.tiff", pixels, mpp=10 * mpp, layout="generic")
    found = estimate(path)
    assert 1 / 1.5 < found / mpp < 1.5
    with open_slide(str(path)) as slide, pytest.raises(SlideError) as caught:
        resolve_mpp(slide.info, estimated=found)
    assert caught.value.code == "mpp_contradiction"


def test_without_nuclei_there_is_no_estimate(tmp_path):
    with pytest.raises(SlideError, match="`mpp` column") as caught:
        estimate(blank_slide(tmp_path / "glass.svs", size_px=512))
    assert caught.value.code == "mpp_not_estimated"


def test_regions_are_where_the_cells_are(make_file):
    pixels = np.full((2100, 3200, 3), 235, np.uint8)
    pixels[1200:1900, 2200:2900] = (120, 80, 150)
    with open_slide(str(make_file(pixels=pixels))) as slide:
        first, *others = foreground_regions(slide)
    assert first == (2048, 1024, 1024, 1024)
    assert len(others) < 3  # thumbnail pixels on the border are shared


def test_a_damaged_region_is_passed_over(make_file):
    path = make_file(width=2048, height=1024, tile=1024)
    damage_tile(path, 0)
    seen = []

    def detector(pixels, mpp):
        seen.append(pixels.shape)
        xy = np.array([[50 * i, 50 * i] for i in range(1, 20)], np.float32)
        return np.column_stack([xy, np.full((19, 2), (14 * mpp, 1))])

    with open_slide(str(path)) as slide:
        found = mpp_from_nuclei(slide, detector)
    assert set(seen) == {(1024, 1024, 3)}
    assert len(seen) == 14  # one region, every assumed mpp
    assert found == pytest.approx(3.5 / 14, rel=0.02)


def test_what_changes_with_the_assumed_mpp_is_no_nucleus():
    def detector(pixels, mpp):
        nucleus = [100, 100, 12 * mpp, 0.9]
        texture = [300, 300, 3.0, 0.8]  # always the size that is looked for
        brief = [[500, 500, 8 * mpp, 0.9]] if mpp < 0.2 else []
        return np.array([nucleus, texture, *brief], np.float32)

    radii = lasting_radii_px(np.zeros((9, 9, 3), np.uint8), detector)
    assert radii.tolist() == pytest.approx([12])
    nothing = lasting_radii_px(np.zeros((9, 9, 3), np.uint8), lambda *_: np.zeros((0, 4)))
    assert nothing.shape == (0,)


def test_the_common_radius_is_that_of_nuclei_not_of_cells_or_lobes(rng):
    nuclei = 14 * np.exp(rng.normal(0, 0.2, 100))
    cells = 80 * np.exp(rng.normal(0, 0.2, 120))
    specks = 3 * np.exp(rng.normal(0, 0.2, 40))
    found = common_radius_px(np.concatenate([nuclei, cells, specks]))
    assert found == pytest.approx(14, rel=0.1)
    assert common_radius_px(np.array([9.0])) == pytest.approx(9, rel=0.01)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["lbc_fields_dev.svs", "mosaic_000.svs", "mosaic_001.tiff"])
def test_real_slides_do_not_contradict_their_true_mpp(name, real_data):
    true = 0.25
    found = estimate(real_data / "slides" / name)
    assert 1 / MAX_RATIO_TO_ESTIMATE < found / true < MAX_RATIO_TO_ESTIMATE
