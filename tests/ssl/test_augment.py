"""Rendering of views against torchvision, scipy and numpy."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from scipy.ndimage import gaussian_filter

from cytoray.errors import InputError
from cytoray.perturb import (
    CROP_POLICIES,
    VIEW_COLUMN,
    CropPolicy,
    identity_views,
    sample_views,
    tile_rng,
)
from cytoray.ssl.augment import IMAGENET_MEAN, IMAGENET_STD, render_crops, render_views

S = 48
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def smooth_tiles(count=3, tile_px=S):
    """Coloured tiles with structure at several scales, uint8 (count, S, S, 3)."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 255, (count, tile_px, tile_px, 3))
    smooth = gaussian_filter(noise, (0, 2, 2, 0))
    low, high = smooth.min(), smooth.max()
    return torch.from_numpy(((smooth - low) / (high - low) * 255).astype(np.uint8))


@pytest.fixture
def tiles():
    return smooth_tiles()


def rows_for(tiles, num_views=1, **changes):
    """Identity rows with some columns changed, (B, V, P)."""
    rows = torch.from_numpy(identity_views(tiles.shape[1], num_views))
    rows = rows.repeat(len(tiles), 1, 1)
    for name, value in changes.items():
        rows[..., VIEW_COLUMN[name]] = torch.as_tensor(value, dtype=torch.float32)
    return rows


def as_images(tiles):
    """Float (B, 3, S, S) in 0..1, torchvision's layout."""
    return tiles.permute(0, 3, 1, 2) / 255


def render(tiles, out_px=S, **changes):
    return render_views(tiles, rows_for(tiles, **changes), out_px, **PLAIN)[:, 0]


def close(got, expected, atol=1e-3):
    np.testing.assert_allclose(got.numpy(), np.asarray(expected), atol=atol)


def test_identity_rows_give_the_tile(tiles):
    close(render(tiles), as_images(tiles), atol=1e-5)


def test_centre_crop_is_exact(tiles):
    close(
        render(tiles, 20, width_px=20, height_px=20), as_images(tiles)[..., 14:34, 14:34], atol=1e-5
    )


def test_normalisation(tiles):
    got = render_views(tiles, rows_for(tiles), S)[:, 0]
    close(got, tvf.normalize(as_images(tiles), list(IMAGENET_MEAN), list(IMAGENET_STD)), 1e-4)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flip", [0, 1])
def test_turns_and_flips_are_exact(tiles, turns, flip):
    expected = np.rot90(as_images(tiles).numpy(), turns, axes=(2, 3))
    expected = expected[..., ::-1] if flip else expected
    close(render(tiles, quarter_turns=turns, flip=flip), expected, atol=1e-5)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flip", [0, 1])
def test_turned_path_agrees_with_the_upright_path(tiles, turns, flip):
    box = {"center_x_px": 20.3, "center_y_px": 25.1, "width_px": 24, "height_px": 30}
    rows = rows_for(tiles, quarter_turns=turns, flip=flip, blur_sigma_px=0.8, **box)
    upright = render_views(tiles, rows, S, **PLAIN)
    rows[..., VIEW_COLUMN["angle_deg"]] = 1e-4
    close(render_views(tiles, rows, S, **PLAIN), upright)


@pytest.mark.parametrize("angle_deg", [90.0, 180.0, -90.0])
def test_turned_window_by_right_angles(tiles, angle_deg):
    # A window turned clockwise shows its content turned counter-clockwise.
    expected = np.rot90(as_images(tiles).numpy(), round(angle_deg / 90), axes=(2, 3))
    close(render(tiles, angle_deg=angle_deg), expected)


def test_turned_window_matches_torchvision(tiles):
    expected = tvf.rotate(as_images(tiles), 30, tvf.InterpolationMode.BILINEAR)
    got = render(tiles, angle_deg=30.0)
    inner = slice(14, 34)
    close(got[..., inner, inner], expected[..., inner, inner])


def test_upright_views_ignore_the_turned_flag(tiles):
    rows = rows_for(tiles, width_px=40, height_px=33)
    one, two, three = (render_views(tiles, rows, 20, turned=t) for t in (None, False, True))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    torch.testing.assert_close(one, three, rtol=0, atol=0)


@pytest.mark.parametrize("out_px", [16, 31, 48, 96])
def test_resize_matches_torchvision_antialias(tiles, out_px):
    close(render(tiles, out_px), tvf.resize(as_images(tiles), [out_px, out_px], antialias=True))


@pytest.mark.parametrize(("out_px", "margin"), [(12, 2), (48, 3)])
def test_crop_matches_torchvision_inside(tiles, out_px, margin):
    got = render(tiles, out_px, center_x_px=19, center_y_px=25, width_px=30, height_px=26)
    size = [out_px, out_px]
    expected = tvf.resized_crop(as_images(tiles), 12, 4, 26, 30, size, antialias=True)
    inner = slice(margin, -margin)
    close(got[..., inner, inner], expected[..., inner, inner])


@pytest.mark.parametrize(
    ("column", "reference"),
    [
        ("brightness", tvf.adjust_brightness),
        ("contrast", tvf.adjust_contrast),
        ("saturation", tvf.adjust_saturation),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
def test_colour_factors_match_torchvision(tiles, column, reference, factor):
    got = render(tiles, **{column: factor})
    close(got, torch.stack([reference(image, factor) for image in as_images(tiles)]))


def test_grey_matches_torchvision(tiles):
    close(render(tiles, gray=1), tvf.rgb_to_grayscale(as_images(tiles), 3))


def test_solarize_matches_torchvision(tiles):
    expected = tvf.solarize(tiles.permute(0, 3, 1, 2), 128) / 255
    close(render(tiles, solarize=1), expected)


def test_hue_turns_chroma_and_keeps_luma():
    grey = np.linspace(0.4, 0.6, S)  # far from the ends: nothing is clamped
    tile = np.stack([grey + 0.05, grey, grey - 0.05], axis=-1) * 255
    tiles = torch.from_numpy(np.tile(tile, (1, S, 1, 1)).round().astype(np.uint8))
    luma = torch.tensor([0.299, 0.587, 0.114])
    before = as_images(tiles)
    for hue in (-0.5, -0.1, 0.2, 0.5):
        after = render(tiles, hue=hue)
        close(torch.einsum("bchw,c->bhw", after, luma), torch.einsum("bchw,c->bhw", before, luma))
        assert (after - before).abs().max() > 0.01
    close(render(tiles, hue=-0.5), render(tiles, hue=0.5))
    half = render(tiles, hue=0.5)
    middle = torch.einsum("bchw,c->bhw", before, luma)[:, None]
    close(half, 2 * middle - before)  # half a turn: the opposite colour


def test_hue_turns_red_towards_green():
    red = torch.full((1, S, S, 3), 100, dtype=torch.uint8)
    red[..., 0] = 160
    got = render(red, hue=1 / 3)[0, :, 0, 0]
    assert got.argmax() == 1


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_matches_scipy_everywhere(tiles, sigma):
    image = as_images(tiles).numpy()
    expected = gaussian_filter(image, (0, 0, sigma, sigma), mode="mirror", truncate=6)
    close(render(tiles, blur_sigma_px=sigma), expected, 1e-4)


def test_blur_matches_torchvision(tiles):
    expected = tvf.gaussian_blur(as_images(tiles), [13, 13], [1.2, 1.2])
    close(render(tiles, blur_sigma_px=1.2), expected)


def test_colour_then_blur_then_solarize_order(tiles):
    got = render(tiles, brightness=1.3, gray=1, blur_sigma_px=1.5, solarize=1)
    image = tvf.rgb_to_grayscale(as_images(tiles), 3) * 1.3
    image = tvf.gaussian_blur(image, [17, 17], [1.5, 1.5]).clamp(0, 1)
    expected = tvf.solarize(image, 127.5 / 255)
    sure = (image - 127.5 / 255).abs() > 2e-3
    close(got[sure], expected[sure], 2e-3)
    assert sure.float().mean() > 0.95


def test_views_do_not_depend_on_their_neighbours():
    tiles = smooth_tiles(5)  # a CPU takes two for each thread, and one is left
    policy = CropPolicy(rotation_deg=20.0)
    nuclei = np.random.default_rng(0).uniform(0, S, (4, 2))
    rows = [sample_views(nuclei, S, policy, tile_rng(0, 0, str(i))) for i in range(5)]
    rows = torch.from_numpy(np.stack(rows))
    together = render_views(tiles, rows, 24)
    assert together.shape == (5, 10, 3, 24, 24)
    for tile in range(5):
        alone = render_views(tiles[tile : tile + 1], rows[tile : tile + 1, 5:6], 24)
        torch.testing.assert_close(together[tile : tile + 1, 5:6], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, render_views(tiles, rows, 24), rtol=0, atol=0)


def test_autocast_does_not_touch_the_result(tiles):
    rows = rows_for(tiles, blur_sigma_px=1.0, contrast=0.7)
    plain = render_views(tiles, rows, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = render_views(tiles, rows, 30)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(plain, mixed, rtol=0, atol=0)


@pytest.mark.parametrize("name", CROP_POLICIES)
def test_render_crops_splits_global_and_local(tiles, name):
    policy = CROP_POLICIES[name]
    nuclei = np.array([[10.0, 20.0]])
    rows = [sample_views(nuclei, S, policy, tile_rng(0, 0, str(i))) for i in range(len(tiles))]
    big, small = render_crops(tiles, torch.from_numpy(np.stack(rows)), policy, 32, 16)
    assert big.shape == (len(tiles), policy.num_global, 3, 32, 32)
    assert small.shape == (len(tiles), policy.num_local, 3, 16, 16)
    assert big.isfinite().all()
    assert small.isfinite().all()


def test_wrong_shapes_are_named(tiles):
    with pytest.raises(InputError, match="uint8"):
        render_views(tiles.float(), rows_for(tiles), 16)
    with pytest.raises(InputError, match="sample_views"):
        render_views(tiles, rows_for(tiles)[..., :5], 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_the_cpus_views_without_a_sync(tiles):
    policy = CropPolicy(rotation_deg=20.0)
    nuclei = np.random.default_rng(0).uniform(0, S, (4, 2))
    rows = [sample_views(nuclei, S, policy, tile_rng(0, 0, str(i))) for i in range(len(tiles))]
    rows = torch.from_numpy(np.stack(rows))
    expected = render_crops(tiles, rows, policy, 32, 16)
    on_device = tiles.cuda(), rows.cuda()
    render_crops(*on_device, policy, 32, 16)  # fills the cache of constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = render_crops(*on_device, policy, 32, 16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(got, expected, strict=True):
        # one solarised pixel at the threshold may fall on the other side
        assert ((ours.cpu() - theirs).abs() > 1e-2).float().mean() < 1e-3


@pytest.mark.real_data
def test_real_fields_render_in_range():
    import cv2

    root = os.environ.get("CYTORAY_REAL_DATA")
    if not root:
        pytest.skip("CYTORAY_REAL_DATA is not set")
    fields = sorted(Path(root, "fields").glob("*.JPG"))[:2]
    images = [cv2.cvtColor(cv2.imread(str(f)), cv2.COLOR_BGR2RGB)[:224, :224] for f in fields]
    tiles = torch.from_numpy(np.stack(images))
    policy = CROP_POLICIES["dinov2"]
    rows = [sample_views(np.zeros((0, 2)), 224, policy, tile_rng(0, 0, f.name)) for f in fields]
    views = render_views(tiles, torch.from_numpy(np.stack(rows)), 96, **PLAIN)
    assert views.min() >= 0
    assert views.max() <= 1
    assert views.std(dim=(2, 3, 4)).min() > 0.005
