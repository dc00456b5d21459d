from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cytoray.errors import InputError
from cytoray.nuclei import (
    SmallConfig,
    SmallDetector,
    build_detector,
    mask_centroids,
    pool_scores,
    score_detections,
)
from cytoray.nuclei import small as small_module
from cytoray.nuclei.small import SHIPPED_WEIGHTS, find_centres, normalise, run_tiled
from cytoray.synthetic import SynthConfig, make_slide

PINK = (232, 170, 190)


@pytest.fixture(scope="module")
def detect() -> SmallDetector:
    return SmallDetector()


Truth = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def slides() -> list[Truth]:
    """Pixels at 0.25 um/px of slides no training seed gives, and their true centres in um."""
    config = SynthConfig(num_slides=2, size_px=1024, held_out=0, cells_per_mm2=300, seed=778)
    made = [make_slide(config, index) for index in range(2)]
    columns = [[s.nuclei[name].to_numpy() for name in ("x_level0", "y_level0")] for s in made]
    return [
        (s.pixels, (np.column_stack(xy) + 0.5) * 0.25) for s, xy in zip(made, columns, strict=True)
    ]


@pytest.fixture(scope="module")
def slide(slides) -> Truth:
    return slides[1]


def shrunk(pixels: np.ndarray, factor: float) -> np.ndarray:
    small = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.uint8)


def centres_um(found: np.ndarray, mpp: float) -> np.ndarray:
    return (found[:, :2] + 0.5) * mpp


def test_the_contract(detect, field):
    pixels = field(100, 0.5).disc(40, 50, 18, PINK).disc(40, 50, 4).disc(80, 20, 6).pixels()
    found = detect(pixels, 0.5)
    assert found.shape == (2, 4)
    assert found.dtype == np.float32
    assert (np.diff(found[:, 3]) <= 0).all(), "best first"
    assert ((found[:, 3] >= SmallConfig().min_score) & (found[:, 3] <= 1)).all()
    small, large = found[np.argsort(found[:, 2])]
    image = field(1, 0.5)
    for nucleus, x_um, y_um, radius_um in ((small, 40, 50, 4), (large, 80, 20, 6)):
        away = np.hypot(nucleus[0] - image.to_px(x_um), nucleus[1] - image.to_px(y_um))
        assert away * 0.5 < 1.0
        assert 0.75 < nucleus[2] / radius_um < 1.35


def test_by_name_with_options(field):
    pixels = field(100, 0.5).disc(40, 50, 4).pixels()
    assert build_detector("small").name == "small"
    assert len(build_detector("small")(pixels, 0.5)) == 1
    assert len(build_detector("small", min_score=0.999)(pixels, 0.5)) == 0
    with pytest.raises(InputError, match="'small' has no option 'flavour'"):
        build_detector("small", flavour=1)


@pytest.mark.parametrize("shape", [(0, 0), (0, 9), (1, 1), (3, 5), (9, 301)])
def test_empty_and_tiny_images(detect, shape):
    found = detect(np.full((*shape, 3), 230, np.uint8), 0.25)
    assert found.shape == (0, 4)
    assert found.dtype == np.float32


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_blank_and_noisy_images_have_no_nuclei(detect, mpp):
    rng = np.random.default_rng(0)
    for level in (0, 128, 255):
        assert len(detect(np.full((256, 256, 3), level, np.uint8), mpp)) == 0
    for sigma in (2, 10):
        noise = np.clip(230 + rng.normal(0, sigma, (256, 256, 3)), 0, 255).astype(np.uint8)
        assert len(detect(noise, mpp)) == 0


def test_greyscale_images(detect, slide):
    pixels, truth_um = slide
    grey = cv2.cvtColor(shrunk(pixels, 0.5), cv2.COLOR_RGB2GRAY)
    found = detect(np.repeat(grey[..., None], 3, axis=2), 0.5)
    assert score_detections(centres_um(found, 0.5), truth_um, 3.0).f1 > 0.85


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2)])
def test_other_colours(detect, slide, order):
    pixels, truth_um = slide
    found = detect(shrunk(pixels, 0.5)[..., order], 0.5)
    assert score_detections(centres_um(found, 0.5), truth_um, 3.0).f1 > 0.85


def test_magnification_does_not_matter(detect, slide):
    pixels, _ = slide
    fine, coarse = detect(pixels, 0.25), detect(shrunk(pixels, 0.5), 0.5)
    same = score_detections(centres_um(fine, 0.25), centres_um(coarse, 0.5), 1.0)
    assert same.truth > 10
    assert same.f1 > 0.97


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.75])
def test_generated_slides(detect, slides, mpp):
    scores = []
    for pixels, truth_um in slides:
        found = detect(shrunk(pixels, 0.25 / mpp), mpp)
        scores.append(score_detections(centres_um(found, mpp), truth_um, 3.0))
    score = pool_scores(scores)
    assert score.truth > 50
    assert score.f1 >= 0.9


def test_red_cells_folds_and_borders_are_no_nuclei(detect, field):
    image = field(160, 0.5)
    for x, y in ((30, 30), (50, 34), (36, 60)):
        image.disc(x, y, 3.6, (226, 165, 170)).disc(x, y, 1.5, (230, 195, 195))
    pixels = image.disc(110, 100, 25, PINK).pixels()
    cv2.line(pixels, (190, 170), (250, 230), (150, 80, 110), 5, cv2.LINE_AA)
    pixels[:, :30] = 0
    pixels[280:] = 255
    assert len(detect(pixels, 0.5)) == 0


def test_the_same_twice(detect, slide):
    pixels = shrunk(slide[0], 0.5)
    assert np.array_equal(detect(pixels, 0.5), SmallDetector()(pixels, 0.5))


def test_windows_give_what_one_pass_gives(detect, monkeypatch):
    density = np.random.default_rng(0).gamma(1.0, 0.3, (301, 413, 3)).astype(np.float32)
    density = cv2.GaussianBlur(density, (0, 0), 2.0)
    whole = run_tiled(detect.forward, density)
    monkeypatch.setattr(small_module, "_WINDOW_PX", 96)
    calls = []

    def counted(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        calls.append(part.shape)
        return detect.forward(part)

    windows = run_tiled(counted, density)
    assert len(calls) == 20
    assert max(max(shape[:2]) for shape in calls) <= 96 + 2 * 72
    for one, other in zip(whole, windows, strict=True):
        assert one.shape == (151, 207)
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_centres_are_found_between_cells():
    y, x = np.mgrid[0:40, 0:40].astype(np.float32)
    logit = np.full((40, 40), -6, np.float32)
    for centre_x, centre_y in ((10.3, 12.0), (30.0, 25.4), (33.0, 25.4)):
        bell = 4 - ((x - centre_x) ** 2 + (y - centre_y) ** 2)
        logit = np.maximum(logit, bell)
    logit[25, 30] += 0.5
    found = find_centres(logit, np.full((40, 40), 2.0, np.float32), 0.5, 0.9)
    assert len(found) == 3
    np.testing.assert_allclose(found[found[:, 0].argmin(), :2], (21.1, 24.5), atol=0.05)
    merged = find_centres(logit, np.full((40, 40), 6.0, np.float32), 0.5, 0.9)
    assert len(merged) == 2, "within 0.9 radii two are one"
    assert merged[0, 0] == pytest.approx(60.5, abs=0.3), "the better one is kept"


def test_density_does_not_hang_on_the_lamp():
    rng = np.random.default_rng(0)
    stain = rng.uniform(0, 1, (64, 64, 3)) * (rng.random((64, 64, 1)) < 0.5)
    bright, dim = (np.rint(level * np.exp(-stain)).astype(np.uint8) for level in (250, 180))
    assert np.abs(normalise(bright) - normalise(dim)).max() < 0.03
    assert normalise(bright).dtype == np.float32


def test_the_shipped_weights_are_small(detect):
    from cytoray.nuclei.small_net import load_net

    assert SHIPPED_WEIGHTS.stat().st_size < 2_000_000
    assert sum(value.numel() for value in load_net().parameters()) < 1_000_000
    assert SHIPPED_WEIGHTS.with_suffix(".json").is_file(), "the record of their training"


def test_weights_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.safetensors is no file"):
        SmallDetector(SmallConfig(weights=tmp_path / "nowhere.safetensors"))
    whole = SHIPPED_WEIGHTS.read_bytes()
    bad = {
        "text.safetensors": b"no weights at all",
        "empty.safetensors": b"",
        "cut.safetensors": whole[: len(whole) // 2],
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    header = {"format": "cytoray small nuclei detector 1", "widths": "[8, 16, 24]"}
    save_file({"a": torch.zeros(3)}, tmp_path / "wrong.safetensors", metadata=header)
    for name in (*bad, "other.safetensors", "wrong.safetensors"):
        with pytest.raises(InputError, match=name):
            SmallDetector(SmallConfig(weights=tmp_path / name))


def test_bad_input_and_options_are_refused(detect):
    with pytest.raises(InputError, match="uint8"):
        detect(np.zeros((8, 8, 3), np.float32), 0.5)
    with pytest.raises(InputError, match="mpp"):
        detect(np.zeros((8, 8, 3), np.uint8), 0.0)
    with pytest.raises(InputError) as caught:
        SmallConfig(min_score=1.0, overlap=0)
    assert len(caught.value.problems) == 2


@pytest.mark.real_data
@pytest.mark.skipif("CYTORAY_REAL_DATA" not in os.environ, reason="CYTORAY_REAL_DATA is not set")
def test_labelled_liquid_based_fields(detect):
    folder = Path(os.environ["CYTORAY_REAL_DATA"]) / "nuclei"
    scores = []
    for path in sorted((folder / "images").iterdir()):
        pixels = np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR), np.uint8)[..., ::-1]
        mask = np.asarray(cv2.imread(str(folder / "masks" / path.name), cv2.IMREAD_GRAYSCALE))
        found = detect(pixels, 0.6)
        scores.append(score_detections(found[:, :2], mask_centroids(mask), 10))
    score = pool_scores(scores)
    assert score.truth > 1000
    assert score.f1 > 0.85
