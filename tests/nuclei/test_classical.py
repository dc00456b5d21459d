from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.nuclei import (
    ClassicalConfig,
    detect_nuclei,
    mask_centroids,
    match_points,
    pool_scores,
    score_detections,
)

PINK = (232, 170, 190)
CYAN = (150, 200, 205)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("radius_um", [2.5, 4.0, 6.0, 9.0])
def test_one_disc_is_found_to_a_pixel(field, mpp, radius_um):
    image = field(120, mpp).disc(61.3, 57.9, radius_um)
    found = detect_nuclei(image.pixels(), mpp)
    assert found.shape == (1, 4)
    assert found.dtype == np.float32
    assert abs(found[0, 0] - image.to_px(61.3)) < 1
    assert abs(found[0, 1] - image.to_px(57.9)) < 1
    assert found[0, 2] == pytest.approx(radius_um, rel=0.15)


@pytest.mark.parametrize("cytoplasm", [PINK, CYAN])
@pytest.mark.parametrize("nucleus", [(90, 65, 140), (130, 95, 150), (60, 60, 60)])
def test_nucleus_in_coloured_cytoplasm(field, cytoplasm, nucleus):
    image = field(120, 0.5).disc(60, 60, 28, cytoplasm).disc(64, 55, 3.5, nucleus)
    found = detect_nuclei(image.pixels(), 0.5)
    assert len(found) == 1
    assert np.hypot(found[0, 0] - image.to_px(64), found[0, 1] - image.to_px(55)) < 1


def test_grey_image(field):
    image = field(120, 0.25, glass=(200, 200, 200)).disc(60, 60, 25, (170, 170, 170))
    found = detect_nuclei(image.disc(60, 60, 4, (90, 90, 90)).pixels(), 0.25)
    assert len(found) == 1


def test_touching_nuclei_are_told_apart(field):
    image = field(120, 0.5).disc(50, 60, 4).disc(58.5, 60, 4).disc(54, 67.5, 4)
    found = detect_nuclei(image.pixels(), 0.5)
    truth = np.array([[50, 60], [58.5, 60], [54, 67.5]]) / 0.5 - 0.5
    assert len(found) == 3
    assert (match_points(found[:, :2], truth, 2.0) >= 0).all()


def test_scores_rise_with_contrast(field):
    image = field(160, 0.5)
    for place, level in enumerate((150, 120, 90, 60)):
        image.disc(30 + 32 * place, 80, 4, (level, level, level))
    found = detect_nuclei(image.pixels(), 0.5)
    by_place = found[np.argsort(found[:, 0])]
    assert len(found) == 4
    assert (np.diff(by_place[:, 3]) > 0).all()
    assert (np.diff(found[:, 3]) <= 0).all(), "best first"


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_blank_images_have_no_nuclei(mpp):
    for level in (0, 128, 255):
        assert len(detect_nuclei(np.full((256, 256, 3), level, np.uint8), mpp)) == 0


@pytest.mark.parametrize("sigma", [2, 10, 40])
@pytest.mark.parametrize("jpeg", [False, True])
def test_noise_has_no_nuclei(sigma, jpeg):
    rng = np.random.default_rng(sigma)
    image = np.clip(230 + rng.normal(0, sigma, (512, 512, 3)), 0, 255).astype(np.uint8)
    if jpeg:
        _, coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 50])
        image = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    for mpp in (0.25, 0.5, 1.0):
        assert len(detect_nuclei(image, mpp)) == 0


def test_red_blood_cells_folds_and_cell_rims_are_no_nuclei(field):
    image = field(160, 0.5).disc(40, 40, 3.6, (222, 160, 165)).disc(110, 100, 25, PINK)
    pixels = image.pixels()
    cv2.line(pixels, (190, 170), (250, 230), (150, 80, 110), 5, cv2.LINE_AA)
    assert len(detect_nuclei(pixels, 0.5)) == 0


@pytest.mark.parametrize("border", [0, 255])
def test_rotated_image_with_border(field, border):
    image = field(200, 0.5).disc(100, 100, 30, PINK).disc(100, 100, 4)
    pixels = image.pixels()
    turn = cv2.getRotationMatrix2D((199.5, 199.5), 30, 1.0)
    turned = cv2.warpAffine(pixels, turn, (400, 400), borderValue=(border, border, border))
    found = detect_nuclei(turned, 0.5)
    assert len(found) == 1
    assert np.hypot(*(found[0, :2] - 199.5)) < 1.5


def test_nucleus_beside_a_black_border_is_kept(field):
    pixels = field(120, 0.5).disc(60, 60, 25, PINK).disc(50, 60, 4).pixels()
    pixels[:, :76] = 0
    found = detect_nuclei(pixels, 0.5)
    assert len(found) == 1
    assert np.hypot(found[0, 0] - 99.5, found[0, 1] - 119.5) < 2


def test_magnification_does_not_matter(field):
    rng = np.random.default_rng(3)
    image = field(256, 0.25)
    truth = np.array([(x, y) for x in range(25, 250, 40) for y in range(25, 250, 40)], float)
    truth += rng.uniform(-6, 6, truth.shape)
    for x, y in truth:
        image.disc(x, y, 15, PINK).disc(x, y, float(rng.uniform(2.8, 6)))
    fine = image.pixels()
    coarse = cv2.resize(fine, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    fine_um = (detect_nuclei(fine, 0.25)[:, :2] + 0.5) * 0.25
    coarse_um = (detect_nuclei(np.asarray(coarse, np.uint8), 0.5)[:, :2] + 0.5) * 0.5
    assert len(fine_um) == len(coarse_um) == len(truth)
    assert score_detections(fine_um, truth, 0.5).f1 == 1
    assert score_detections(coarse_um, fine_um, 0.3).f1 == 1


def test_detection_of_a_part_agrees_with_the_whole(field):
    image = field(256, 0.5)
    for x in range(20, 256, 30):
        for y in range(20, 256, 30):
            image.disc(x, y, 3.5)
    whole = image.pixels()
    x, y = detect_nuclei(whole, 0.5)[:, :2].T
    expected = int(((x > 132) & (x < 368) & (y > 132) & (y < 368)).sum())
    part = detect_nuclei(whole[100:400, 100:400], 0.5)[:, :2]
    inner = ((part > 32) & (part < 268)).all(axis=1)
    assert expected > 0
    assert int(inner.sum()) == expected


def test_tiny_and_odd_images():
    assert detect_nuclei(np.zeros((3, 5, 3), np.uint8), 0.25).shape == (0, 4)
    assert detect_nuclei(np.full((9, 301, 3), 230, np.uint8), 1.0).shape == (0, 4)


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="uint8"):
        detect_nuclei(np.zeros((8, 8, 3), np.float32), 0.5)
    with pytest.raises(InputError, match="mpp"):
        detect_nuclei(np.zeros((8, 8, 3), np.uint8), 0.0)


def test_config_lists_every_problem():
    with pytest.raises(InputError) as caught:
        ClassicalConfig(min_radius_um=5, max_radius_um=2, num_scales=0, min_score=2, work_um=-1)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_generated_slides(mpp):
    from cytoray.synthetic import SynthConfig, make_slide

    config = SynthConfig(num_slides=2, size_px=1024, held_out=0, seed=5)
    matched, total = 0, 0
    for index in range(2):
        slide = make_slide(config, index)
        factor = config.mpp / mpp
        pixels = cv2.resize(slide.pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        found = detect_nuclei(np.asarray(pixels, np.uint8), mpp)
        found_um = (found[:, :2] + 0.5) * mpp
        truth = np.column_stack(
            [slide.nuclei[name].to_numpy() for name in ("x_level0", "y_level0")]
        )
        score = score_detections(found_um, (truth + 0.5) * config.mpp, 3.0)
        matched, total = matched + score.matched, total + score.detected + score.truth
    assert total > 50
    assert 2 * matched / total > 0.9


@pytest.mark.real_data
@pytest.mark.skipif("CYTORAY_REAL_DATA" not in os.environ, reason="CYTORAY_REAL_DATA is not set")
def test_labelled_liquid_based_fields():
    folder = Path(os.environ["CYTORAY_REAL_DATA"]) / "nuclei"
    scores = []
    for path in sorted((folder / "images").iterdir()):
        pixels = np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR), np.uint8)[..., ::-1]
        mask = np.asarray(cv2.imread(str(folder / "masks" / path.name), cv2.IMREAD_GRAYSCALE))
        found = detect_nuclei(pixels, 0.6)
        scores.append(score_detections(found[:, :2], mask_centroids(mask), 10))
    score = pool_scores(scores)
    assert score.truth > 1000
    assert score.f1 > 0.9
    assert min(score.precision, score.recall) > 0.87
