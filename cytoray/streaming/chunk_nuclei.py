"""Nuclei of one chunk, the same from the table as detected on the fly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cytoray.slides import ChunkPixels, Grid

Detector = Callable[[np.ndarray, float], np.ndarray]

# A nucleus on the border of a chunk is whole in the image that is searched; it belongs to the
# chunk its centre lies in.
HALO_UM = 16.0
# Positions are array indices, 0 being the centre of the first pixel, whose edge is at -0.5.
_HALF = np.float32(0.5)


def halo_px(mpp: float) -> int:
    """Pixels read around a chunk so that nuclei on its border are seen whole."""
    return round(HALO_UM / mpp)


def chunk_core_px(chunk: ChunkPixels, grid: Grid) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the chunk without its halo, in the slide's frame at the grid's mpp."""
    x, y = chunk.chunk_x_px, chunk.chunk_y_px
    return x, y, x + grid.chunk_px, y + grid.chunk_px


def detect_in_chunk(
    detect: Detector,
    chunk: ChunkPixels,
    *,
    core_px: tuple[int, int, int, int],
    mpp: float,
    mpp_slide: tuple[float, float],
) -> np.ndarray:
    """Detect nuclei in a chunk read with its halo and keep those whose centre is in the chunk.

    Args:
        detect: pixels, mpp -> float32 (N, 4): x_px, y_px, radius_um, score.
        chunk: read with a halo of `halo_px`.
        core_px: x0, y0, x1, y1 of the chunk itself in the slide's frame at `mpp`.
        mpp: um/px of the pixels.
        mpp_slide: um per level-0 pixel along x and y.

    Returns:
        float32 (N, 4): x_level0, y_level0, radius_um, score.
    """
    found = np.asarray(detect(chunk.pixels, mpp), np.float32).reshape(-1, 4).copy()
    scale = np.array([mpp / mpp_slide[0], mpp / mpp_slide[1]], np.float32)
    origin = np.array([chunk.origin_x_px, chunk.origin_y_px], np.float32)
    found[:, :2] = (found[:, :2] + origin + _HALF) * scale - _HALF
    return found[inside_core(found, core_px, mpp=mpp, mpp_slide=mpp_slide)]


def inside_core(
    nuclei_level0: np.ndarray,
    core_px: tuple[int, int, int, int],
    *,
    mpp: float,
    mpp_slide: tuple[float, float],
) -> np.ndarray:
    """Which nuclei of a slide have their centre in a chunk; bool (N,).

    The same comparison is made when nuclei are detected and when they come from the table, so both
    give the same nuclei to the same chunk; it is the one that gives them to tiles, so none is lost
    on a border.
    """
    xy = to_tile_frame(nuclei_level0, mpp=mpp, mpp_slide=mpp_slide, tile_x_px=0, tile_y_px=0)
    return np.all((xy >= core_px[:2]) & (xy < core_px[2:]), axis=1)


def to_tile_frame(
    nuclei_level0: np.ndarray,
    *,
    mpp: float,
    mpp_slide: tuple[float, float],
    tile_x_px: int,
    tile_y_px: int,
) -> np.ndarray:
    """Level-0 centres as tile pixels; float32 (N, 2)."""
    scale = np.array([mpp_slide[0] / mpp, mpp_slide[1] / mpp], np.float32)
    corner = np.array([tile_x_px, tile_y_px], np.float32)
    return (nuclei_level0[:, :2] + _HALF) * scale - _HALF - corner
