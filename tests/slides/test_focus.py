import cv2
import numpy as np
import pytest

from cytoray.slides.chunks import ChunkPixels, read_chunk
from cytoray.slides.focus import OUT_OF_FOCUS, chunk_focus, score_of_blur, tile_focus
from cytoray.slides.foreground import slide_foreground
from cytoray.slides.grid import Grid, SlideGrid, mask_indices
from cytoray.slides.manifest import read_manifest
from cytoray.slides.mpp import resolve_mpp
from cytoray.slides.reader import open_slide
from cytoray.synthetic import SynthConfig, make_slide

SIGMAS_UM = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


def edges(mpp: float, sigma_um: float, dark: float = 0.5, size_um: float = 120.0) -> np.ndarray:
    """Smooth-edged discs of 8 to 14 um radius, blurred by a Gaussian; uint8 (h, w, 3)."""
    fine = 8  # drawn finer than shown, so that its edge is one
    side = round(size_um / mpp)
    picture = np.zeros((side * fine, side * fine), np.float32)
    for x, y, radius in [(30, 30, 14), (85, 35, 11), (35, 88, 12), (88, 88, 9), (60, 60, 8)]:
        centre = (round(x / mpp * fine), round(y / mpp * fine))
        cv2.circle(picture, centre, round(radius / mpp * fine), 1.0, -1)
    picture = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    if sigma_um:
        picture = cv2.GaussianBlur(picture, (0, 0), sigma_um / mpp)
    grey = 235 * 10 ** (-dark * picture)
    return cv2.merge([np.rint(grey).astype(np.uint8)] * 3)


def worn(picture: np.ndarray, noise: float, quality: int) -> np.ndarray:
    """With a camera's noise, and compressed."""
    rng = np.random.default_rng(0)
    noisy = np.clip(picture + rng.normal(0, noise, picture.shape), 0, 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))


@pytest.mark.parametrize("mpp", [0.25, 0.37, 0.5, 0.75])
@pytest.mark.parametrize("dark", [0.05, 0.3, 0.9])
def test_the_score_is_that_of_the_blur_whatever_the_scale_and_stain(mpp, dark):
    for sigma in SIGMAS_UM[1:]:
        score = tile_focus(edges(mpp, sigma, dark), mpp)
        assert abs(score - score_of_blur(sigma)) < 0.06, sigma
    scores = [tile_focus(edges(mpp, sigma, dark), mpp) for sigma in SIGMAS_UM]
    assert np.all(np.diff(scores) < 0)


@pytest.mark.parametrize(("noise", "quality"), [(2, 90), (4, 75), (6, 85)])
def test_noise_and_jpeg_do_not_fake_sharpness(noise, quality):
    sharp = tile_focus(worn(edges(0.5, 0.3), noise, quality), 0.5)
    blurred = tile_focus(worn(edges(0.5, 4.0), noise, quality), 0.5)
    assert sharp > 0.6
    assert blurred < OUT_OF_FOCUS


def test_an_empty_tile_has_no_score():
    for noise, quality in [(0, 95), (3, 80), (3, 40)]:
        field = worn(np.full((224, 224, 3), 233, np.uint8), noise, quality)
        assert np.isnan(tile_focus(field, 0.5))
    shade = np.linspace(200, 240, 224).astype(np.uint8)[None].repeat(224, 0)
    assert np.isnan(tile_focus(cv2.merge([shade] * 3), 0.5))


def test_a_pale_sharp_tile_is_sharper_than_a_dark_blurred_one():
    pale = tile_focus(worn(edges(0.5, 0.4, dark=0.06), 1.5, 85), 0.5)
    dark = tile_focus(worn(edges(0.5, 3.0, dark=1.0), 1.5, 85), 0.5)
    assert pale > 0.6 > OUT_OF_FOCUS > dark


def chunk_of(pixels: np.ndarray, tile_px: int, halo: int, bad=None) -> ChunkPixels:
    return ChunkPixels(
        pixels=pixels,
        origin_x_px=1000 - halo,
        origin_y_px=0,
        chunk_x_px=1000,
        chunk_y_px=0,
        tile_px=tile_px,
        bad_tiles=bad or {},
    )


def test_chunk_focus_is_tile_focus_of_each_tile():
    rng = np.random.default_rng(1)
    pixels = np.full((300, 20 + 8 * 100 + 20, 3), 235, np.uint8)
    for x, y in rng.uniform((0, 0), (840, 300), (60, 2)):
        cv2.circle(pixels, (int(x), int(y)), 12, (110, 90, 160), -1, cv2.LINE_AA)
    pixels[:100, 20:120] = 235
    scores = chunk_focus(chunk_of(pixels, 100, 20, {9: "damaged"}), 0.5)
    assert scores.shape == (64,)
    assert scores.dtype == np.float32
    assert np.isnan(scores[[0, 9]]).all()
    assert np.isnan(scores[24:]).all()
    assert np.isfinite(scores[:24]).sum() > 15
    x, y = 20 + 200, 100
    assert scores[10] == tile_focus(pixels[y : y + 100, x : x + 100], 0.5)


def test_generated_slides_lose_sharpness_with_blur_tile_by_tile():
    slide = make_slide(SynthConfig(num_slides=1, held_out=0, size_px=1536), 0)
    levels = []
    for sigma in (0.0, 1.0, 2.0, 4.0):
        pixels = cv2.resize(slide.pixels, (768, 768), interpolation=cv2.INTER_AREA)
        if sigma:
            pixels = worn(cv2.GaussianBlur(pixels, (0, 0), sigma / 0.5), 1.5, 85)
        blocks = pixels.reshape(6, 128, 6, 128, 3).swapaxes(1, 2).reshape(36, 128, 128, 3)
        levels.append([tile_focus(block, 0.5) for block in blocks])
    scores = np.array(levels)
    told = scores[:, np.isfinite(scores).all(axis=0)]
    assert told.shape[1] > 20
    assert (np.diff(told, axis=0) < 0).all(axis=0).mean() >= 0.95
    assert (told[0] > OUT_OF_FOCUS).mean() >= 0.95
    # Specks narrower than the scale look at any blur sharper than edges do.
    assert np.median(told[3]) < OUT_OF_FOCUS
    assert (told[0][:, None] > told[3][None]).mean() > 0.99


@pytest.mark.real_data
def test_real_tiles_in_focus_are_told_from_blurred_ones(real_data):
    manifest = read_manifest(real_data / "slides" / "manifest.csv")
    entries = [(row["path"], row["mpp"]) for row in list(manifest.iter_rows())[:2]]
    entries.append((str(real_data / "slides" / "lbc_fields_dev.svs"), 0.25))
    columns = []
    for path, mpp in entries:
        with open_slide(path) as slide:
            scale = resolve_mpp(slide.info, mpp)
            info, grid = slide.info, Grid()
            layout = SlideGrid.of(grid, info.width_px_level0, info.height_px_level0, scale)
            mask = slide_foreground(slide, layout).keep_masks[0]
            chunk = read_chunk(slide, scale, grid, 0, 0)
        for tile in chunk.tiles(mask_indices(mask)[::2]):
            blurred = [worn(cv2.GaussianBlur(tile, (0, 0), s / 0.5), 1.5, 80) for s in (1, 2, 3, 4)]
            columns.append([tile_focus(picture, 0.5) for picture in (tile, *blurred)])
    scores = np.array(columns).T
    assert scores.shape[1] > 60
    sharp, soft = scores[0], scores[2:].ravel()
    assert not np.isnan(sharp).any()
    assert (sharp >= OUT_OF_FOCUS).mean() >= 0.99
    assert (np.diff(scores, axis=0) < 0).all(axis=0).mean() >= 0.95
    soft = soft[~np.isnan(soft)]
    assert (sharp[:, None] > soft[None]).mean() > 0.97
