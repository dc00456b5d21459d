from __future__ import annotations

import cv2
import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.nuclei.small import REFERENCE_UM, STRIDE, WORK_UM
from cytoray.nuclei.small_augment import augment
from cytoray.nuclei.small_bodies import DEBRIS, NUCLEI, paint_nucleus
from cytoray.nuclei.small_canvas import Scene, expose
from cytoray.nuclei.small_data import (
    CropSource,
    LabelledImage,
    crop_at_work_scale,
    generated_images,
    make_targets,
    mask_nuclei,
    painted_images,
    read_folder,
)
from cytoray.nuclei.small_scenes import SETTINGS, paint_scene


def dots(side_px: int, places: list[tuple[float, float]], radius_px: float) -> LabelledImage:
    """Black discs on white, with their truth."""
    canvas = np.full((side_px, side_px), 255, np.uint8)
    for x, y in places:
        centre = (round(x * 16), round(y * 16))
        cv2.circle(canvas, centre, round(radius_px * 16), 0, -1, cv2.LINE_AA, shift=4)
    nuclei = np.array([(x, y, radius_px) for x, y in places], np.float32)
    pixels = np.repeat(canvas[..., None], 3, axis=2)
    return LabelledImage(name="dots", pixels=pixels, mpp=0.5, nuclei=nuclei)


@pytest.mark.parametrize("kind", sorted(NUCLEI))
def test_a_nucleus_has_the_size_and_place_it_says(kind):
    for seed in range(5):
        nucleus = paint_nucleus(np.random.default_rng(seed), kind, 6.0, 0.5)
        area = float(nucleus.mask.sum())
        assert nucleus.radius_px == pytest.approx(np.sqrt(area / np.pi), rel=0.01)
        assert 3.5 < nucleus.radius_px < 8.5
        assert nucleus.mask.shape == nucleus.dose.shape
        edge = np.concatenate([nucleus.mask[[0, -1]].ravel(), nucleus.mask[:, [0, -1]].ravel()])
        assert edge.max() < 0.1, "the patch holds the whole nucleus"


def test_nuclei_of_a_scene_are_darker_than_before():
    for seed in range(6):
        scene = Scene(np.random.default_rng(seed), 64)
        scene.absorbance += 0.4
        before = expose(scene).mean()
        assert scene.add_nucleus(30, 33, scene.draw_nucleus())
        x, y, radius = scene.nuclei[0]
        yy, xx = np.mgrid[0:64, 0:64]
        inside = np.hypot(xx - x, yy - y) < 0.5 * radius
        assert scene.absorbance[inside].mean() > 0.4 + 0.1
        assert before > 0


def test_no_nucleus_hides_another():
    scene = Scene(np.random.default_rng(0), 64)
    assert scene.add_nucleus(30, 30, scene.draw_nucleus())
    assert not scene.add_nucleus(31, 30, scene.draw_nucleus())
    assert len(scene.nuclei) == 1


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_settings(name):
    counts = []
    for seed in range(4):
        scene = Scene(np.random.default_rng(seed), 96)
        SETTINGS[name][1](scene)
        pixels = expose(scene)
        assert pixels.shape == (96, 96, 3)
        assert np.isfinite(scene.absorbance).all()
        counts.append(len(scene.nuclei))
    assert (sum(counts) == 0) == (name == "nothing")


@pytest.mark.parametrize("kind", sorted(DEBRIS))
def test_debris_is_a_dose(kind):
    dose = DEBRIS[kind](np.random.default_rng(1), 5.0)
    assert dose.dtype == np.float32
    assert dose.ndim == 2
    assert dose.min() >= 0
    assert 0.05 < dose.max() < 4


def test_a_scene_hangs_on_its_seed_alone():
    one, other = (paint_scene(np.random.default_rng(5), 96) for _ in range(2))
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])
    assert not np.array_equal(one[0], paint_scene(np.random.default_rng(6), 96)[0])


def test_truth_moves_with_the_image():
    image = dots(400, [(100, 120), (220.5, 90), (300, 310), (60, 330)], 9)
    seen = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pixels, nuclei = augment(rng, *crop_at_work_scale(rng, image, 128))
        assert pixels.shape == (128, 128, 3)
        assert pixels.dtype == np.uint8
        inner = nuclei[((nuclei[:, :2] > 12) & (nuclei[:, :2] < 115)).all(axis=1)]
        for x, y, radius in inner:
            yy, xx = np.mgrid[0:128, 0:128]
            away = np.hypot(xx - x, yy - y)
            inside = pixels[away < 0.6 * radius].mean()
            around = pixels[(away > 1.5 * radius) & (away < 1.9 * radius)]
            assert inside + 20 < np.percentile(around, 75)
            seen += 1
    assert seen > 15


def test_targets():
    nuclei = np.array([(20.5, 30.5, 6.0), (60.5, 61.5, 12.0)], np.float32)
    heat, log_radius, centre = make_targets(nuclei, 96)
    assert heat.shape == log_radius.shape == centre.shape == (48, 48)
    assert centre.sum() == 2
    assert centre[15, 10]
    assert heat.max() <= 1
    assert heat[15, 10] > 0.9
    known = ~np.isnan(log_radius)
    assert known[15, 10]
    assert not known[0, 0]
    assert np.exp(log_radius[15, 10]) * REFERENCE_UM == pytest.approx(6.0 * WORK_UM)
    assert heat[30, 34] > heat[15, 14], "a larger nucleus has a wider bell"
    nothing = make_targets(np.zeros((0, 3), np.float32), 96)
    assert nothing[0].max() == 0
    assert np.isnan(nothing[1]).all()
    assert not nothing[2].any()
    assert STRIDE == 2


def test_batches_mix_their_sources():
    image = dots(300, [(150, 150)], 8)
    source = CropSource([(0.5, [image])], 64, kept=4)
    batch = source.batch(np.random.default_rng(0), 6)
    assert 0 < len(source.scenes) <= 4
    assert batch.density.shape == (6, 64, 64, 3)
    assert batch.density.dtype == np.float32
    assert batch.heat.shape == (6, 32, 32)
    assert np.isfinite(batch.density).all()


def test_generated_and_painted_images_have_truth():
    (slide,) = generated_images(1, 3, size_px=512)
    assert slide.pixels.shape == (256, 256, 3)
    assert slide.mpp == 0.5
    assert len(slide.nuclei) > 3
    grey = slide.pixels.mean(axis=2)
    x, y = np.rint(slide.nuclei[:, :2]).astype(int).clip(0, 255).T
    assert grey[y, x].mean() < grey.mean() - 30
    assert len(painted_images(3, 0, 96)) == 3


def test_folder(tmp_path):
    image = dots(120, [(40, 40), (80, 70)], 8)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), image.pixels)
    cv2.imwrite(str(tmp_path / "masks" / "a.tif"), 255 - image.pixels[..., 0])
    (read,) = read_folder(tmp_path / "images", tmp_path / "masks", 0.5)
    assert np.array_equal(read.pixels, image.pixels)
    np.testing.assert_allclose(read.nuclei[:, :2], [(40, 40), (80, 70)], atol=0.1)
    np.testing.assert_allclose(read.nuclei[:, 2], 8, rtol=0.05)


def test_folder_lists_every_problem(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="there is no image"):
        read_folder(tmp_path / "images", tmp_path / "masks", 0.5)
    with pytest.raises(InputError, match="no folder"):
        read_folder(tmp_path / "nowhere", tmp_path / "masks", 0.5)
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    cv2.imwrite(str(tmp_path / "images" / "c.png"), np.zeros((9, 9, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "masks" / "b.png"), np.zeros((9, 9), np.uint8))
    cv2.imwrite(str(tmp_path / "masks" / "c.png"), np.zeros((8, 9), np.uint8))
    with pytest.raises(InputError) as caught:
        read_folder(tmp_path / "images", tmp_path / "masks", 0.5)
    assert len(caught.value.problems) == 3


def test_specks_of_a_mask_are_left_out():
    mask = np.zeros((60, 60), np.uint8)
    cv2.circle(mask, (30, 30), 8, 255, -1)
    mask[5:7, 5:7] = 255
    mask[50, 50] = 120
    assert len(mask_nuclei(mask)) == 1
