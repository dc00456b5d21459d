"""Where the cells are: foreground of a cytology slide, sparse and pale on a bright field.

Histology thresholds (Otsu on saturation) split a slide of sparse cells inside the background
noise. Here the background's own colour and noise are measured, and whatever absorbs light beyond
them is foreground. Borders, marker pen, and the lines of wells, coverslips, bubbles and fibres are
taken out.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cytoray.errors import SlideError
from cytoray.slides.artefacts import BLACK_LEVEL, large_artefacts
from cytoray.slides.grid import SlideGrid
from cytoray.slides.readers_base import SlideReader
from cytoray.slides.thin_lines import thin_lines

FOREGROUND_MPP = 4.0
# Cells are sparse: one 20 um cell in a 112 um tile is 2.5 % of it.
DEFAULT_KEEP_SHARE = 0.02
MAX_OVERVIEW_PX = 4096
SAMPLED_PX = 500_000

# Optical density below which no stain counts, whatever the noise; faint cytoplasm is near 0.06.
MIN_OPTICAL_DENSITY = 0.045
NOISE_SIGMAS = 5.0
MIN_OBJECT_UM = 10.0


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A small picture of the whole slide, uint8 (h, w, 3), with its exact um per pixel."""

    pixels: np.ndarray
    mpp_x: float
    mpp_y: float


@dataclass(frozen=True, kw_only=True)
class Foreground:
    """What the index keeps of a slide's foreground.

    Attributes:
        keep_masks: one per chunk, row-major, bit i set where tile i is used.
        shares: float32 (tile_rows, tile_columns) in 0..1.
        foreground_share: share of the slide's area that is foreground.
        num_tiles: tiles kept.
        mask: bool (h, w) at `overview`'s scale.
        overview: the picture it was computed from.
    """

    keep_masks: list[int]
    shares: np.ndarray
    foreground_share: float
    num_tiles: int
    mask: np.ndarray
    overview: Overview


def read_overview(
    reader: SlideReader, mpp_x: float, mpp_y: float, target_mpp: float = FOREGROUND_MPP
) -> Overview:
    """The whole slide at about `target_mpp`, by averaging whole source pixels of a fit level.

    Very large slides come coarser, so that no side exceeds 4096 px. `mpp_x, mpp_y` are the
    slide's um per level-0 pixel.
    """
    info = reader.info
    target = max(target_mpp, info.width_px_level0 * mpp_x / MAX_OVERVIEW_PX)
    target = max(target, info.height_px_level0 * mpp_y / MAX_OVERVIEW_PX)
    wanted = target / max(mpp_x, mpp_y)
    fitting = [i for i, down in enumerate(info.level_downsamples) if down <= wanted * 1.01]
    level = max(fitting, default=0)
    downsample = info.level_downsamples[level]
    width, height = info.level_dimensions[level]
    factor = max(1, min(round(wanted / downsample), width, height))
    pixels = reader.read_reduced(level, 0, 0, width, height, factor)
    step = downsample * factor
    return Overview(pixels=pixels, mpp_x=mpp_x * step, mpp_y=mpp_y * step)


def background_rgb(rgb: np.ndarray) -> np.ndarray:
    """Colour of the empty field: the median around the brightest well-populated grey level.

    Args:
        rgb: uint8 (h, w, 3). Black borders and pure white (never scanned) do not count unless
            nearly all is white.

    Returns:
        float64 (3,) in 0..255.
    """
    step = _sampling(rgb)
    pixels = rgb[::step, ::step].reshape(-1, 3)
    lowest, highest = pixels.min(axis=1), pixels.max(axis=1)
    scanned = (highest > BLACK_LEVEL) & (lowest < 254)
    if scanned.mean() < 0.02:
        scanned = highest > BLACK_LEVEL
    pixels = pixels[scanned]
    if len(pixels) == 0:
        return np.full(3, 255.0)
    grey = pixels.astype(np.float32).mean(axis=1)
    counts = np.bincount(grey.astype(np.int64), minlength=256).astype(np.float64)
    mass = np.convolve(counts, np.ones(9), mode="same") / len(grey)
    smooth = np.convolve(mass, np.ones(5) / 5, mode="same")
    peaks = np.flatnonzero(
        (smooth[1:-1] >= smooth[:-2]) & (smooth[1:-1] >= smooth[2:]) & (mass[1:-1] >= 0.03)
    )
    level = int(peaks[-1]) + 1 if len(peaks) else int(np.percentile(grey, 99))
    near = np.abs(grey - level) <= 5
    return np.median(pixels[near] if near.any() else pixels, axis=0)


def _sampling(picture: np.ndarray) -> int:
    """Step at which a picture is sampled where only its distribution matters."""
    return max(1, int((picture.shape[0] * picture.shape[1] / SAMPLED_PX) ** 0.5))


def optical_density(rgb: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Light absorbed relative to the empty field, in log10 units, root-sum-square over channels.

    Args:
        rgb: uint8 (h, w, 3).
        background: (3,) colour of the empty field, see `background_rgb`.

    Returns:
        float32 (h, w). Brighter than the background counts as 0 in a channel.
    """
    levels = np.arange(256, dtype=np.float32)[:, None]
    table = np.log10((background[None].astype(np.float32) + 1) / (levels + 1)).clip(min=0)
    squared = np.square(table).astype(np.float32)
    red, green, blue = (cv2.LUT(c, squared[:, i]) for i, c in enumerate(cv2.split(rgb)))
    cv2.add(red, green, red)
    cv2.add(red, blue, red)
    return cv2.sqrt(red)


def foreground_mask(rgb: np.ndarray, mpp: float) -> np.ndarray:
    """Foreground of a cytology slide.

    Args:
        rgb: uint8 (h, w, 3), the slide at low resolution.
        mpp: um per pixel of `rgb`, about 4.

    Returns:
        bool (h, w): True on cells and other stained matter; False on the empty field, on parts
        never scanned (white), and on what `large_artefacts` and `thin_lines` find.
    """
    background = background_rgb(rgb)
    smooth = cv2.GaussianBlur(rgb, (0, 0), max(0.3, 3.0 / mpp))
    density = optical_density(smooth, background)
    mask = density > _density_threshold(smooth, background)
    mask &= ~large_artefacts(rgb, density, mpp)
    mask &= ~thin_lines(mask, density, mpp)
    # A speck narrower than a small nucleus is dust or noise.
    side = max(1, round(MIN_OBJECT_UM / mpp))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    return cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, kernel).astype(bool)


def _density_threshold(smooth: np.ndarray, background: np.ndarray) -> float:
    """Optical density that the empty field's noise does not reach.

    Args:
        smooth: uint8 (h, w, 3), blurred as the picture the threshold is for.
        background: (3,) colour of the empty field.

    The commonest density among the faint ones is the field's. Its noise is measured on the brighter
    side, where there are no cells: pale cytoplasm would pass for noise on the other.
    """
    step = _sampling(smooth)
    grey = smooth[::step, ::step].mean(axis=2, dtype=np.float32)
    signed = np.log10((background.mean() + 1) / (grey + 1)) * 3**0.5
    faint = signed[np.abs(signed) < 2 * MIN_OPTICAL_DENSITY]
    if faint.size == 0:
        return MIN_OPTICAL_DENSITY
    counts, edges = np.histogram(faint, bins=72, range=(-0.09, 0.09))
    field = float(edges[int(np.argmax(np.convolve(counts, np.ones(5), mode="same")))]) + 0.00125
    brighter = field - faint[(faint < field) & (faint > field - 0.03)]
    spread = 1.4826 * float(np.median(brighter)) if brighter.size else 0.0
    return float(np.clip(field + NOISE_SIGMAS * spread, MIN_OPTICAL_DENSITY, 0.12))


def tile_shares(mask: np.ndarray, mask_mpp_x: float, mask_mpp_y: float, layout: SlideGrid):
    """Share of foreground in every tile of a slide.

    Args:
        mask: bool (h, w) with its corner at the slide's.
        mask_mpp_x, mask_mpp_y: um per pixel of the mask.
        layout: the grid on the slide.

    Returns:
        float32 (tile_rows, tile_columns) in 0..1; mask pixels count by the part of them that
        lies in the tile.
    """
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.float64)
    integral[1:, 1:] = mask.astype(np.float64).cumsum(axis=0).cumsum(axis=1)
    side_um = layout.grid.tile_px * layout.grid.mpp
    xs = np.arange(layout.tile_columns + 1) * side_um / mask_mpp_x
    ys = np.arange(layout.tile_rows + 1) * side_um / mask_mpp_y
    rows = _interpolate(integral, ys)
    corners = _interpolate(rows.T, xs).T
    sums = corners[1:, 1:] - corners[:-1, 1:] - corners[1:, :-1] + corners[:-1, :-1]
    area = (side_um / mask_mpp_x) * (side_um / mask_mpp_y)
    return np.clip(sums / area, 0, 1).astype(np.float32)


def _interpolate(table: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of `table` at fractional positions, linearly; positions beyond the end are cut."""
    at = np.clip(at, 0, len(table) - 1)
    low = np.minimum(at.astype(np.int64), len(table) - 2)
    weight = (at - low)[:, None]
    return table[low] * (1 - weight) + table[low + 1] * weight


def slide_foreground(
    reader: SlideReader, layout: SlideGrid, *, keep_share: float = DEFAULT_KEEP_SHARE
) -> Foreground:
    """Find a slide's foreground and the tiles worth reading.

    Args:
        reader: an open slide.
        layout: the grid on it.
        keep_share: tiles with at least this share of foreground are kept.

    Raises:
        SlideError: `no_foreground` when no tile is kept, `decode_error` when the overview cannot
            be read.
    """
    overview = read_overview(reader, layout.mpp_x, layout.mpp_y)
    mask = foreground_mask(overview.pixels, (overview.mpp_x * overview.mpp_y) ** 0.5)
    shares = tile_shares(mask, overview.mpp_x, overview.mpp_y, layout)
    num_tiles = int((shares >= keep_share).sum())
    if num_tiles == 0:
        raise SlideError(
            "no_foreground",
            f"no tile has {keep_share:.1%} of foreground; the slide looks empty",
        )
    return Foreground(
        keep_masks=layout.chunk_keep_masks(shares, keep_share),
        shares=shares,
        foreground_share=float(mask.mean()),
        num_tiles=num_tiles,
        mask=mask,
        overview=overview,
    )
