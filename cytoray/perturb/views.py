"""Which crops a tile gives and how each is augmented (Cyto-SSL, Algorithm 1, lines 4-13).

Every random decision of a view is drawn here, on the CPU, from the tile's own generator, and put
in one row of floats. `cytoray.ssl.augment.render_views` turns tiles and rows into crops on the
device, with no randomness of its own.

Frame: tile pixels; pixel i of an axis covers [i, i+1), the tile is [0, S) x [0, S).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cytoray.errors import choose, raise_problems

VIEW_PARAMS = (
    "center_x_px",  # crop centre in the tile
    "center_y_px",
    "width_px",  # crop extent along the tile's x and y axes (before rotation by angle_deg)
    "height_px",
    "quarter_turns",  # 0..3 counter-clockwise turns of the crop, before the flip
    "angle_deg",  # the crop window is turned clockwise by this, about its centre
    "flip",  # 1: mirror left-right, after the quarter turns
    "brightness",  # factors; 1 leaves the image alone
    "contrast",
    "saturation",  # 0 is greyscale
    "hue",  # shift as a share of the colour circle, -0.5..0.5
    "gray",  # 1: greyscale
    "blur_sigma_px",  # Gaussian blur in pixels of the rendered view; 0 is none
    "solarize",  # 1: invert values from 128 up
)
NUM_VIEW_PARAMS = len(VIEW_PARAMS)
CENTRES = ("nucleus", "random")
VIEW_COLUMN = {name: index for index, name in enumerate(VIEW_PARAMS)}
_IDENTITY = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0}


@dataclass(frozen=True, kw_only=True)
class CropPolicy:
    """The views of one tile: how many, where, how large, and how they are augmented.

    Attributes:
        num_global: global views; they come first in the rows.
        num_local: local views.
        global_scale: range of a global crop's area as a fraction of the tile's.
        local_scale: same for local crops.
        aspect: range of width / height, drawn log-uniformly.
        centre: `nucleus` centres crops on nuclei, `random` places them anywhere.
        jitter: the crop centre is moved from the nucleus by up to this share of half the crop,
            on each axis; below 1, so the nucleus stays inside.
        quarter_turns: rotate by a random multiple of 90 degrees (exact, free).
        flips: mirror half of the views.
        rotation_deg: further rotation, uniform in +-rotation_deg (needs interpolation, slower).
        brightness: factor is uniform in 1 +- this.
        contrast: same.
        saturation: same.
        hue: shift is uniform in +- this share of the colour circle.
        color_prob: chance that a view's colours are jittered.
        gray_prob: chance that a view is greyscale.
        blur_sigma_px: range of the Gaussian blur's sigma, in pixels of the rendered view.
        global_blur_prob: chance of blur per global view; the last value holds for the rest.
        local_blur_prob: chance of blur of a local view.
        global_solarize_prob: chance of solarisation per global view, like `global_blur_prob`.

    Raises:
        InputError: lists every value out of range.
    """

    num_global: int = 2
    num_local: int = 8
    global_scale: tuple[float, float] = (0.5, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.5)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    centre: str = "nucleus"
    jitter: float = 0.5
    quarter_turns: bool = True
    flips: bool = True
    rotation_deg: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    color_prob: float = 0.8
    gray_prob: float = 0.2
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    global_blur_prob: tuple[float, ...] = (1.0, 0.1)
    local_blur_prob: float = 0.5
    global_solarize_prob: tuple[float, ...] = (0.0, 0.2)

    def __post_init__(self) -> None:
        for name in _RANGES + _PER_GLOBAL:  # YAML gives lists; tuples keep the policy hashable
            object.__setattr__(self, name, tuple(getattr(self, name)))
        choose("crop centre", self.centre, CENTRES)
        raise_problems("the crop policy is not usable:", _problems(self))

    @property
    def num_views(self) -> int:
        """Global and local views together."""
        return self.num_global + self.num_local


_RANGES = ("global_scale", "local_scale", "aspect", "blur_sigma_px")
_PER_GLOBAL = ("global_blur_prob", "global_solarize_prob")
_CHANCES = ("color_prob", "gray_prob", "local_blur_prob", *_PER_GLOBAL)


def _problems(policy: CropPolicy) -> list[str]:
    problems = []
    for name in _RANGES:
        value = getattr(policy, name)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            problems.append(f"{name} must be (low, high) with 0 < low <= high, not {value}")
    for name in ("global_scale", "local_scale"):
        if max(getattr(policy, name), default=0) > 1:
            problems.append(f"{name} is a fraction of the tile's area and cannot exceed 1")
    for name in _CHANCES:
        values = np.atleast_1d(getattr(policy, name))
        if not len(values) or not ((values >= 0) & (values <= 1)).all():
            problems.append(f"{name} must be a chance in 0..1, not {getattr(policy, name)}")
    limits = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5, "rotation_deg": 180}
    for name, limit in limits.items():
        if not 0 <= getattr(policy, name) <= limit:
            problems.append(f"{name} must be in 0..{limit}, not {getattr(policy, name)}")
    if not 0 <= policy.jitter < 1:
        problems.append(f"jitter must be in 0..1 (1 excluded), not {policy.jitter}")
    if policy.num_global < 1 or policy.num_local < 0:
        problems.append("num_global must be at least 1 and num_local at least 0")
    return problems


# Each method's published views. SimCLR, MoCo and BYOL see two views of one scale, no local ones.
_TWO_ALIKE = {"num_local": 0, "global_scale": (0.08, 1.0)}
CROP_POLICIES: dict[str, CropPolicy] = {
    "dinov2": CropPolicy(),  # scales of UniCAS
    "dino": CropPolicy(global_scale=(0.4, 1.0), local_scale=(0.05, 0.4)),
    "ibot": CropPolicy(num_local=10, global_scale=(0.14, 1.0), local_scale=(0.05, 0.4)),  # CytoFM
    "simclr": CropPolicy(
        **_TWO_ALIKE,
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        global_blur_prob=(0.5,),
        global_solarize_prob=(0.0,),
    ),
    "moco": CropPolicy(**_TWO_ALIKE),
    "byol": CropPolicy(**_TWO_ALIKE),
}


class _Limits(NamedTuple):
    """A policy as arrays over its V views, so that drawing needs no loop."""

    scale_low: np.ndarray
    scale_span: np.ndarray
    blur_prob: np.ndarray
    solarize_prob: np.ndarray
    jitter_span: np.ndarray  # (4,): brightness, contrast, saturation, hue


@lru_cache(maxsize=64)
def _limits(policy: CropPolicy) -> _Limits:
    num_global, num_local = policy.num_global, policy.num_local

    def per_view(for_global: tuple[float, ...], for_local: float) -> np.ndarray:
        padded = [for_global[min(i, len(for_global) - 1)] for i in range(num_global)]
        return np.array(padded + [for_local] * num_local)

    low = per_view((policy.global_scale[0],), policy.local_scale[0])
    high = per_view((policy.global_scale[1],), policy.local_scale[1])
    return _Limits(
        scale_low=low,
        scale_span=high - low,
        blur_prob=per_view(policy.global_blur_prob, policy.local_blur_prob),
        solarize_prob=per_view(policy.global_solarize_prob, 0.0),
        jitter_span=np.array([policy.brightness, policy.contrast, policy.saturation, policy.hue]),
    )


def sample_views(
    nuclei_xy_px: np.ndarray, tile_px: int, policy: CropPolicy, rng: np.random.Generator
) -> np.ndarray:
    """Draw every random decision of a tile's views.

    Each view is centred on a nucleus drawn (with replacement) from those inside the tile, jittered,
    then moved into the tile as far as its size permits; the nucleus stays inside the crop. Without
    a nucleus inside, or with `policy.centre` = `random`, crops lie anywhere in the tile. The same
    numbers are drawn from `rng` in every case.

    Args:
        nuclei_xy_px: float (N, 2) or wider, centres in tile pixels; N may be 0.
        tile_px: S.
        policy: the views to draw.
        rng: the tile's generator (`tile_rng`).

    Returns:
        float32 (V, NUM_VIEW_PARAMS), columns `VIEW_PARAMS`, global views first.
    """
    limits = _limits(policy)
    u = rng.random((17, policy.num_views))
    rows = np.empty((policy.num_views, NUM_VIEW_PARAMS), np.float32)
    size = _sizes(u[0], u[1], limits, policy, tile_px)
    angle_deg = (2 * u[2] - 1) * policy.rotation_deg
    rows[:, 0:2] = _centres(u[3:6], size, angle_deg, nuclei_xy_px, tile_px, policy)
    rows[:, 2:4] = size
    rows[:, 4] = np.floor(4 * u[6]) if policy.quarter_turns else 0
    rows[:, 5] = angle_deg
    rows[:, 6] = (u[7] < 0.5) if policy.flips else 0
    jitter = (2 * u[8:12].T - 1) * limits.jitter_span * (u[12] < policy.color_prob)[:, None]
    jitter[:, :3] += 1
    rows[:, 7:11] = jitter
    rows[:, 11] = u[13] < policy.gray_prob
    low, high = policy.blur_sigma_px
    rows[:, 12] = np.where(u[14] < limits.blur_prob, low + u[15] * (high - low), 0)
    rows[:, 13] = u[16] < limits.solarize_prob
    return rows


def _sizes(
    u_area: np.ndarray, u_aspect: np.ndarray, limits: _Limits, policy: CropPolicy, tile_px: int
) -> np.ndarray:
    """Width and height, float (V, 2), at most the tile's."""
    side = tile_px * np.sqrt(limits.scale_low + u_area * limits.scale_span)
    low, high = policy.aspect
    root = np.sqrt(low * (high / low) ** u_aspect)
    return np.minimum(np.stack([side * root, side / root], axis=1), tile_px)


def _centres(
    u: np.ndarray,
    size: np.ndarray,
    angle_deg: np.ndarray,
    nuclei_xy_px: np.ndarray,
    tile_px: int,
    policy: CropPolicy,
) -> np.ndarray:
    """Crop centres, float (V, 2); `u` (3, V) chooses the nucleus and the offset on x and y."""
    reach = 0.5 * size
    turned = policy.rotation_deg > 0
    cos, sin = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    if turned:  # half extents of the box around the turned window
        reach = np.abs(cos)[:, None] * reach + np.abs(sin)[:, None] * reach[:, ::-1]
        reach = np.minimum(reach, 0.5 * tile_px)
    points = np.asarray(nuclei_xy_px, np.float64)
    if len(points):
        points = points[:, :2]
        points = points[((points >= 0) & (points < tile_px)).all(axis=1)]
    if policy.centre == "random" or not len(points):
        return reach + u[1:].T * (tile_px - 2 * reach)
    nucleus = points[(u[0] * len(points)).astype(np.intp)]
    wanted = nucleus + (u[1:].T - 0.5) * policy.jitter * size
    centre = np.minimum(np.maximum(wanted, reach), tile_px - reach)
    if turned:  # a turned window pushed into the tile can lose a nucleus near a corner: follow it
        offset = _turn(nucleus - centre, cos, -sin)
        lost = offset - np.clip(offset, -0.5 * size, 0.5 * size)
        centre = centre + _turn(lost, cos, sin)
    return centre


def _turn(xy: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn float (V, 2) vectors by the angles whose cosine and sine are given."""
    x, y = xy.T
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=1)


def identity_views(tile_px: int, num_views: int = 1, *, crop_px: float | None = None) -> np.ndarray:
    """Rows that crop the tile's centre and change nothing else, float32 (V, NUM_VIEW_PARAMS).

    Args:
        tile_px: S.
        num_views: V.
        crop_px: side of the centre crop; the whole tile by default.
    """
    side = tile_px if crop_px is None else crop_px
    values = _IDENTITY | {
        "center_x_px": tile_px / 2,
        "center_y_px": tile_px / 2,
        "width_px": side,
        "height_px": side,
    }
    row = np.array([values.get(name, 0.0) for name in VIEW_PARAMS], np.float32)
    return np.tile(row, (num_views, 1))
