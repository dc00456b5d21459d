import numpy as np
import openslide
import pytest

from cytoray.errors import InputError
from cytoray.synthetic import make_slide, plan_slides, read_truth, write_pyramid
from cytoray.synthetic.files import write_atomically


def test_openslide_opens_both_layouts_with_the_right_scale(config, folder):
    seen = set()
    for plan in plan_slides(config):
        with openslide.OpenSlide(folder / plan.path) as slide:
            seen.add(slide.properties["openslide.vendor"])
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(config.mpp)
            assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(config.mpp)
            assert slide.level_dimensions == ((1024, 1024), (512, 512))
            power = slide.properties.get("openslide.objective-power")
            assert power == ("40" if plan.layout == "aperio" else None)
    assert seen == {"aperio", "generic-tiff"}


def test_pixels_survive_the_file_at_every_level(config, folder):
    made = make_slide(config, 0)
    with openslide.OpenSlide(folder / made.plan.path) as slide:
        full = np.asarray(slide.read_region((0, 0), 0, (1024, 1024)).convert("RGB"), int)
        half = np.asarray(slide.read_region((0, 0), 1, (512, 512)).convert("RGB"), int)
    assert np.abs(full - made.pixels).mean() < 3
    small = made.pixels.reshape(512, 2, 512, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - small).mean() < 3


def test_truth_round_trips(config, folder):
    made = make_slide(config, 1)
    truth = read_truth(folder / made.plan.truth_path)
    assert (truth.slide_id, truth.label) == (made.plan.slide_id, made.plan.label)
    assert (truth.size_px, truth.mpp) == (1024, 0.25)
    assert truth.nuclei.schema.equals(made.nuclei.schema)
    assert truth.nuclei["kind"].equals(made.nuclei["kind"])
    for name in ("x_level0", "y_level0", "radius_um"):
        np.testing.assert_allclose(truth.nuclei[name], made.nuclei[name], atol=1e-3)
    np.testing.assert_array_equal(truth.abnormal_boxes_level0, made.abnormal_boxes_level0)


def test_odd_sizes_can_be_written(tmp_path):
    pixels = np.full((901, 1301, 3), 200, np.uint8)
    path = write_pyramid(tmp_path / "odd.tiff", pixels, mpp=0.5, layout="generic")
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((1301, 901), (650, 450))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)


def test_unknown_layout_is_refused(tmp_path):
    with pytest.raises(InputError, match="aperio, generic"):
        write_pyramid(tmp_path / "a.svs", np.zeros((600, 600, 3), np.uint8), mpp=0.25, layout="x")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def fail(file):
        file.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_atomically(tmp_path / "a.json", fail)
    assert list(tmp_path.iterdir()) == []
