"""Views rendered on the device: crop, resize, turn, flip, blur and colour in batched passes.

All decisions come from `cytoray.perturb.views.sample_views`; nothing here is random, and nothing
reads a value back to the host. A GPU renders a whole batch at once, a CPU a few tiles at a time.

Resizing an upright window is separable, so it is two batched matrix products, `A_y X A_xᵀ`.
A row of `A` holds the weights of the tile's pixels in one output pixel: a triangle as wide as the
output pixel (bilinear when enlarging, antialiased when reducing; what `antialias=True` means in
torchvision). A flip reverses the rows, and the Gaussian blur of the resized view is one more
matrix in front, so both come almost free. The filter sees the tile beyond the window, as a camera
would; beyond the tile its edge is repeated. Turned windows (`angle_deg`) take `grid_sample`.

Brightness, contrast, saturation, hue and greyscale are one 3x3 matrix and an offset a view: hue
turns the chroma plane of YIQ, saturation scales it. Clamped once at the end instead of after every
operation, they commute, so a random order would change nothing.

Shapes: B tiles, V views a tile, n = B*V, S tile side, o output side.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cytoray.errors import InputError
from cytoray.perturb.views import NUM_VIEW_PARAMS, VIEW_COLUMN, CropPolicy

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # Y of YIQ, and torchvision's greyscale
# I and Q of YIQ: the axes of the plane in which hue turns.
CHROMA = ((0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
TILES_IN_CACHE = 2  # of 224 px, with their views and matrices: for each thread of a CPU
SOLARIZE_FROM = 127.5 / 255  # 8-bit values from 128 up, safe from rounding


@torch.no_grad()
def render_views(
    tiles: Tensor,
    params: Tensor,
    out_px: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    *,
    turned: bool | None = None,
) -> Tensor:
    """Render views of equal output size; the same tensors give the same views.

    Args:
        tiles: uint8 (B, S, S, 3), on any device.
        params: float32 (B, V, NUM_VIEW_PARAMS), rows of `sample_views`, same device.
        out_px: o, the side of a rendered view.
        mean: per channel, subtracted after scaling to 0..1.
        std: per channel, divided by.
        turned: whether some `angle_deg` is not zero; False skips the interpolation this needs.
            None finds out on the CPU and supposes True elsewhere, where looking would be a sync.

    Returns:
        float32 (B, V, 3, o, o), normalised; float32 under autocast too.

    Raises:
        InputError: shapes or dtypes do not fit.
    """
    _check(tiles, params)
    if tiles.device.type != "cpu":
        return _render(tiles, params, out_px, mean, std, turned)
    views = torch.empty((*params.shape[:2], 3, out_px, out_px))
    # The same views, made while tiles and matrices are in cache.
    step = TILES_IN_CACHE * torch.get_num_threads()
    for part in range(0, len(tiles), step):
        its = slice(part, part + step)
        views[its] = _render(tiles[its], params[its], out_px, mean, std, turned)
    return views


def _render(
    tiles: Tensor,
    params: Tensor,
    out_px: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    turned: bool | None,
) -> Tensor:
    num_tiles, num_views = params.shape[:2]
    with torch.autocast(tiles.device.type, enabled=False):
        p = {name: params[..., i].float().flatten() for name, i in VIEW_COLUMN.items()}
        views = _crop(tiles, p, out_px)
        if turned is None:
            turned = tiles.device.type != "cpu" or bool(p["angle_deg"].any())
        if turned:
            is_turned = (p["angle_deg"] != 0)[:, None, None, None]
            views = torch.where(is_turned, _crop_turned(tiles, p, out_px), views)
        odd = (p["quarter_turns"].remainder(2) == 1)[:, None, None, None]
        views = torch.where(odd, views.transpose(2, 3), views)
        matrix, offset = color_transform(views.mean((2, 3)), p)
        views = torch.baddbmm(offset[:, :, None], matrix, views.flatten(2)).clamp_(0, 1)
        invert_from = torch.where(p["solarize"] > 0, SOLARIZE_FROM, 2.0)[:, None, None]
        views = torch.where(views >= invert_from, 1 - views, views)
        views.sub_(_constant(tuple(mean), views.device)[:, None])
        views.div_(_constant(tuple(std), views.device)[:, None])
    return views.view(num_tiles, num_views, 3, out_px, out_px)


def render_crops(
    tiles: Tensor,
    params: Tensor,
    policy: CropPolicy,
    global_px: int,
    local_px: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> tuple[Tensor, Tensor]:
    """Render all views of a batch: the global ones, and the local ones at their own size.

    Args:
        tiles: uint8 (B, S, S, 3).
        params: float32 (B, V, NUM_VIEW_PARAMS), drawn with `policy`.
        policy: says how many views are global and whether windows are turned.
        global_px: side of a global view.
        local_px: side of a local view.
        mean: see `render_views`.
        std: see `render_views`.

    Returns:
        float32 (B, num_global, 3, global_px, global_px) and (B, num_local, 3, local_px, local_px).
    """
    turned = policy.rotation_deg > 0
    split = params[:, : policy.num_global], params[:, policy.num_global :]
    sizes = global_px, local_px
    big, small = (
        render_views(tiles, rows, size_px, mean, std, turned=turned)
        for rows, size_px in zip(split, sizes, strict=True)
    )
    return big, small


def _crop(tiles: Tensor, p: dict[str, Tensor], out_px: int) -> Tensor:
    """Upright windows, blurred and flipped, float32 (n, 3, o, o) in 0..1; turns still to do."""
    num_tiles, tile_px = tiles.shape[:2]
    num_rows = p["flip"].shape[0]
    blur = blur_matrix(p["blur_sigma_px"], out_px)
    _, mirror_x, mirror_y = _mirrors(p)
    a_y = blur @ resize_matrix(p["center_y_px"], p["height_px"], mirror_y, tile_px, out_px)
    a_x = blur @ resize_matrix(p["center_x_px"], p["width_px"], mirror_x, tile_px, out_px)
    pixels = tiles.permute(0, 1, 3, 2).contiguous().float().div_(255)  # (B, S, 3, S)
    height = num_rows // num_tiles * out_px  # a tile's views, one below the other
    rows = a_y.view(num_tiles, height, tile_px) @ pixels.flatten(2)  # (B, V*o, 3*S)
    rows = rows.view(num_rows, out_px * 3, tile_px)
    views = rows @ a_x.transpose(1, 2)  # (n, o*3, o)
    return views.view(num_rows, out_px, 3, out_px).transpose(1, 2)


def _mirrors(p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Write k quarter turns and the flip as mirrors of the tile's axes, then (k odd) a transpose.

    Counter-clockwise turns in numpy's sense: 1 = transpose of the x-mirrored image, 2 = both axes
    mirrored, 3 = transpose of the y-mirrored one. The flip, last, mirrors what has become x.
    """
    turns = p["quarter_turns"].remainder(4)
    odd = turns.remainder(2) == 1
    flip = p["flip"] > 0
    mirror_x = ((turns == 1) | (turns == 2)) ^ (flip & ~odd)
    mirror_y = (turns >= 2) ^ (flip & odd)
    return odd, mirror_x, mirror_y


def resize_matrix(
    center_px: Tensor, extent_px: Tensor, mirrored: Tensor, tile_px: int, out_px: int
) -> Tensor:
    """Weights that resample one axis of a window: float32 (n, o, S), rows sum to 1.

    Args:
        center_px: (n,) window centre on this axis, tile pixels.
        extent_px: (n,) window extent on this axis.
        mirrored: bool (n,), reverse the outputs.
        tile_px: S.
        out_px: o.
    """
    step = extent_px / out_px
    ramp = torch.arange(out_px, device=center_px.device) - (out_px - 1) / 2
    signed = torch.where(mirrored, -step, step)
    position = center_px[:, None] - 0.5 + signed[:, None] * ramp  # (n, o), in pixel indices
    position = position.clamp(0, tile_px - 1)
    index = torch.arange(tile_px, device=center_px.device, dtype=torch.float32)
    support = step.clamp(min=1).reciprocal()[:, None, None]
    weights = (index - position[..., None]).abs_().mul_(support).neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))


def blur_matrix(sigma_px: Tensor, size_px: int) -> Tensor:
    """Gaussian blur of one axis as a matrix, mirrored at the ends: float32 (n, o, o).

    Sigma 0 is the identity. The bell is cut where it falls below 2e-9 of its peak: further out come
    denormal numbers, which make the matrix products many times slower on a CPU.

    Args:
        sigma_px: (n,) standard deviation in pixels of the view.
        size_px: o.
    """
    last = size_px - 1
    lag = torch.arange(2 * size_px - 1, device=sigma_px.device, dtype=torch.float32)
    falloff = (-0.5 / sigma_px.clamp(min=0.05) ** 2)[:, None]
    far = _bell(falloff * lag**2)  # by i + j: the image mirrored before pixel 0
    near = _bell(falloff * (lag - last) ** 2)  # by i - j + last
    weights = near.unfold(1, size_px, 1).flip(1)
    weights[:, :, 1:] += far.unfold(1, size_px, 1)[:, :, 1:]
    weights[:, :, :last] += far.flip(1).unfold(1, size_px, 1)[:, :, :last]  # after the last pixel
    return weights.div_(weights.sum(2, keepdim=True))


def _bell(exponent: Tensor) -> Tensor:
    return torch.exp(exponent.clamp(min=-21)) * (exponent > -20)


def color_transform(mean_rgb: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation, hue and greyscale as `matrix @ rgb + offset`.

    Contrast blends with the view's mean luma, saturation with each pixel's luma; hue turns the
    chroma plane of YIQ by 2*pi*hue, which keeps the luma.

    Args:
        mean_rgb: float32 (n, 3), the mean colour of each view.
        p: (n,) columns `brightness`, `contrast`, `saturation`, `hue`, `gray`.

    Returns:
        float32 (n, 3, 3) and (n, 3).
    """
    luma, basis = _color_basis(mean_rgb.device)
    chroma = p["saturation"] * (1 - p["gray"])
    turn = -2 * math.pi * p["hue"]  # the sense of HSV: red towards green
    ones = torch.ones_like(turn)
    weights = torch.stack([ones, chroma * torch.cos(turn), chroma * torch.sin(turn)], dim=1)
    gain = (p["brightness"] * p["contrast"])[:, None]
    matrix = ((weights * gain) @ basis).view(-1, 3, 3)
    offset = (p["brightness"] * (1 - p["contrast"]) * (mean_rgb @ luma))[:, None]
    return matrix, offset.expand(-1, 3)


@lru_cache(maxsize=16)
def _color_basis(device: torch.device) -> tuple[Tensor, Tensor]:
    """Luma weights (3,), and the 3x3 matrices of luma, chroma and turned chroma, float32 (3, 9)."""
    to_yiq = torch.tensor([LUMA, *CHROMA], dtype=torch.float64)
    to_rgb = torch.linalg.inv(to_yiq)
    luma = torch.outer(to_rgb[:, 0], to_yiq[0])
    chroma = torch.outer(to_rgb[:, 1], to_yiq[1]) + torch.outer(to_rgb[:, 2], to_yiq[2])
    turned = torch.outer(to_rgb[:, 2], to_yiq[1]) - torch.outer(to_rgb[:, 1], to_yiq[2])
    basis = torch.stack([luma, chroma, turned]).view(3, 9)
    return to_yiq[0].to(device, torch.float32), basis.to(device, torch.float32)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A small tensor kept on its device: making one anew would wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _crop_turned(tiles: Tensor, p: dict[str, Tensor], out_px: int) -> Tensor:
    """Like `_crop` for windows turned by `angle_deg`: bilinear, 2x2 samples when reducing.

    What lies beyond the tile is its mirror image.
    """
    num_tiles, tile_px = tiles.shape[:2]
    num_views = p["flip"].shape[0] // num_tiles
    factor = 2 if tile_px > out_px else 1
    side = factor * out_px
    ramp = (torch.arange(side, device=tiles.device) + 0.5) / side - 0.5
    _, mirror_x, mirror_y = _mirrors(p)
    x = torch.where(mirror_x, -p["width_px"], p["width_px"])[:, None] * ramp
    y = torch.where(mirror_y, -p["height_px"], p["height_px"])[:, None] * ramp
    angle = torch.deg2rad(p["angle_deg"])[:, None, None]
    cos, sin = torch.cos(angle), torch.sin(angle)
    x_px = p["center_x_px"][:, None, None] + cos * x[:, None, :] - sin * y[:, :, None]
    y_px = p["center_y_px"][:, None, None] + sin * x[:, None, :] + cos * y[:, :, None]
    grid = torch.stack([x_px, y_px], dim=-1) * (2 / tile_px) - 1
    views = F.grid_sample(  # a tile's views stacked in one tall grid: no copy of the tile per view
        tiles.permute(0, 3, 1, 2).float().div_(255),
        grid.view(num_tiles, num_views * side, side, 2),
        padding_mode="reflection",
        align_corners=False,
    )
    views = F.avg_pool2d(views, factor) if factor > 1 else views
    views = views.view(num_tiles, 3, num_views, out_px, out_px).transpose(1, 2).flatten(0, 1)
    blur = blur_matrix(p["blur_sigma_px"], out_px)[:, None]
    return blur @ views @ blur.transpose(2, 3)


def _check(tiles: Tensor, params: Tensor) -> None:
    if (
        tiles.dtype != torch.uint8
        or tiles.dim() != 4
        or tiles.shape[1:] != (tiles.shape[1],) * 2 + (3,)
    ):
        raise InputError(
            f"tiles must be uint8 of shape (B, S, S, 3), not {tiles.dtype} {tuple(tiles.shape)}"
        )
    if params.dim() != 3 or params.shape[0] != len(tiles) or params.shape[2] != NUM_VIEW_PARAMS:
        raise InputError(
            f"params must be of shape ({len(tiles)}, V, {NUM_VIEW_PARAMS}), "
            f"not {tuple(params.shape)}; draw them with sample_views"
        )
