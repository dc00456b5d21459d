"""Reading a chunk: the pixels of 8×8 tiles at exactly the requested um/px.

Geometry: target pixel i covers [i, i+1) * scale in level-0 pixels, so the origin of a chunk is a
fraction of a source pixel in general. Pillow's `resize(box=...)` takes that fraction and filters
against aliasing; where the scale is 1 the source pixels are handed on untouched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from cytoray.errors import SlideError
from cytoray.slides.focus import FINE_UM
from cytoray.slides.grid import (
    CHUNK_TILES,
    MIN_TILE_PX,
    TILES_PER_CHUNK,
    Grid,
    SlideGrid,
    bool_to_mask,
    chunk_id,
    mask_indices,
    mask_to_bool,
    parse_tile_id,
    tile_id,
)
from cytoray.slides.mpp import ResolvedMpp
from cytoray.slides.readers_base import SlideInfo, SlideReader
from cytoray.slides.resample import resample
from cytoray.slides.z_stack import StackReader

__all__ = [
    "CHUNK_TILES",
    "TILES_PER_CHUNK",
    "ChunkPixels",
    "Grid",
    "SlideGrid",
    "best_level",
    "bool_to_mask",
    "chunk_id",
    "mask_indices",
    "mask_to_bool",
    "parse_tile_id",
    "read_chunk",
    "read_region_px",
    "tile_id",
]

# A level up to this much coarser than asked is still taken (rounded level sizes).
LEVEL_TOLERANCE = 1.01
# From this ratio on the source is averaged in blocks first, so that memory stays bounded.
BLOCK_RATIO = 3.0


@dataclass(frozen=True, kw_only=True)
class ChunkPixels:
    """The pixels of one chunk with its halo.

    Attributes:
        pixels: uint8 (h, w, 3) RGB at the grid's mpp; zero where nothing could be decoded.
        origin_x_px, origin_y_px: position of pixels[0, 0] in target pixels on the slide (the halo
            is cut at the slide's borders, so this is not always chunk origin minus halo).
        chunk_x_px, chunk_y_px: position of the chunk's first tile in target pixels on the slide.
        tile_px: side of a tile.
        bad_tiles: message by tile index (0..63) for tiles that cannot be decoded: never use them.
        z_index: focal plane the pixels come from; 0 where there is one only.
    """

    pixels: np.ndarray
    origin_x_px: int
    origin_y_px: int
    chunk_x_px: int
    chunk_y_px: int
    tile_px: int
    bad_tiles: dict[int, str] = field(default_factory=dict)
    z_index: int = 0

    def tile_offset(self, index: int) -> tuple[int, int]:
        """(x, y) of a tile's corner inside `pixels`."""
        row, column = divmod(index, CHUNK_TILES)
        x = self.chunk_x_px - self.origin_x_px + column * self.tile_px
        y = self.chunk_y_px - self.origin_y_px + row * self.tile_px
        return x, y

    def tile(self, index: int) -> np.ndarray:
        """View of one tile, uint8 (tile_px, tile_px, 3).

        Raises:
            KeyError: the tile could not be decoded.
        """
        if index in self.bad_tiles:
            raise KeyError(f"tile {index} could not be decoded: {self.bad_tiles[index]}")
        x, y = self.tile_offset(index)
        view = self.pixels[y : y + self.tile_px, x : x + self.tile_px]
        if view.shape[:2] != (self.tile_px, self.tile_px):
            raise IndexError(f"tile {index} is not in this chunk")
        return view

    def tiles(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Several tiles as one block, uint8 (n, tile_px, tile_px, 3), a copy.

        Raises:
            KeyError: one of them could not be decoded.
        """
        block = np.empty((len(indices), self.tile_px, self.tile_px, 3), np.uint8)
        for position, index in enumerate(indices):
            block[position] = self.tile(int(index))
        return block


def best_level(info: SlideInfo, scale: float) -> int:
    """The coarsest level that still has the asked resolution.

    Args:
        info: the slide.
        scale: level-0 pixels per target pixel.
    """
    fitting = [
        level
        for level, downsample in enumerate(info.level_downsamples)
        if downsample <= scale * LEVEL_TOLERANCE
    ]
    return max(fitting, key=lambda level: info.level_downsamples[level], default=0)


def read_chunk(
    reader: SlideReader,
    resolved_mpp: ResolvedMpp,
    grid: Grid,
    chunk_column: int,
    chunk_row: int,
    halo_px: int = 0,
    z_index: int | None = None,
) -> ChunkPixels:
    """Read one chunk at exactly `grid.mpp`.

    When the whole cannot be decoded it is read again piece by piece (tiles, and strips of the
    halo), so that one damaged spot costs only the tiles it touches. Of a stack the pieces come
    from the next plane that can be decoded there.

    Args:
        reader: an open slide.
        resolved_mpp: its scale.
        grid: tile size and mpp.
        chunk_column, chunk_row: which chunk.
        halo_px: margin around the chunk in target pixels, cut at the slide's borders.
        z_index: which plane of a stack to read; default: the sharpest in the chunk. That is a
            matter of the chunk without its halo, so it is the same plane for every halo.

    Raises:
        SlideError: `too_small` or `mpp_too_coarse`, see `SlideGrid`.
        IndexError: no such chunk.
    """
    info = reader.info
    layout = SlideGrid.of(grid, info.width_px_level0, info.height_px_level0, resolved_mpp)
    columns, rows = layout.chunk_tiles(chunk_column, chunk_row)
    left, top = chunk_column * grid.chunk_px, chunk_row * grid.chunk_px
    xs = _edges(left, columns, grid.tile_px, halo_px, layout.width_px)
    ys = _edges(top, rows, grid.tile_px, halo_px, layout.height_px)
    x0, y0, x1, y1 = xs[0], ys[0], xs[-1], ys[-1]
    bad_tiles: dict[int, str] = {}
    chunk = (left, top, columns, rows)
    front, pieces = reader, reader
    if isinstance(reader, StackReader):
        z_index = _sharpest_plane(reader, layout, chunk) if z_index is None else z_index
        front, pieces = reader.planes[z_index], reader.from_plane(z_index)
    try:
        pixels = read_region_px(front, layout, x0, y0, x1 - x0, y1 - y0)
    except SlideError:
        pixels, bad_tiles = _read_pieces(pieces, layout, xs, ys, chunk)
    return ChunkPixels(
        pixels=pixels,
        origin_x_px=x0,
        origin_y_px=y0,
        chunk_x_px=left,
        chunk_y_px=top,
        tile_px=grid.tile_px,
        bad_tiles=bad_tiles,
        z_index=z_index or 0,
    )


def _sharpest_plane(stack: StackReader, layout: SlideGrid, chunk: tuple[int, int, int, int]) -> int:
    """The plane to read of a chunk (left, top, columns and rows of tiles).

    The pixels looked at are as coarse as the focus score allows: a coarse level is quickly read.
    """
    left, top, columns, rows = chunk
    side = layout.grid.tile_px
    fitting = [
        factor
        for factor in range(1, side // MIN_TILE_PX + 1)
        if side % factor == 0 and layout.grid.mpp * factor <= FINE_UM
    ]
    factor = max(fitting, default=1)
    coarse = replace(layout, grid=Grid(tile_px=side // factor, mpp=layout.grid.mpp * factor))
    region = (left // factor, top // factor, columns * side // factor, rows * side // factor)
    return stack.sharpest(lambda plane: read_region_px(plane, coarse, *region), coarse.grid.mpp)


def _edges(start: int, tiles: int, tile_px: int, halo_px: int, limit: int) -> list[int]:
    """Borders of the halo and the tiles along one axis, ascending, without repeats."""
    borders = {start + tile_px * i for i in range(tiles + 1)}
    borders |= {max(0, start - halo_px), min(limit, start + tiles * tile_px + halo_px)}
    return sorted(borders)


def _read_pieces(
    reader: SlideReader,
    layout: SlideGrid,
    xs: list[int],
    ys: list[int],
    chunk: tuple[int, int, int, int],
) -> tuple[np.ndarray, dict[int, str]]:
    """Read every cell between the borders by itself; cells that fail stay zero."""
    left, top, columns, rows = chunk
    side = layout.grid.tile_px
    pixels = np.zeros((ys[-1] - ys[0], xs[-1] - xs[0], 3), np.uint8)
    bad: dict[int, str] = {}
    for y, y_end in pairwise(ys):
        for x, x_end in pairwise(xs):
            column, row = (x - left) // side, (y - top) // side
            try:
                cell = read_region_px(reader, layout, x, y, x_end - x, y_end - y, margin=False)
            except SlideError as error:
                if 0 <= column < columns and 0 <= row < rows:
                    bad[row * CHUNK_TILES + column] = error.message
                continue
            pixels[y - ys[0] : y_end - ys[0], x - xs[0] : x_end - xs[0]] = cell
    return pixels, bad


def read_region_px(
    reader: SlideReader,
    layout: SlideGrid,
    x_px: int,
    y_px: int,
    width_px: int,
    height_px: int,
    *,
    margin: bool = True,
) -> np.ndarray:
    """Read any rectangle of the slide, in target pixels, at exactly the grid's mpp.

    Args:
        reader: an open slide.
        layout: the grid on this slide, which fixes the target frame.
        x_px, y_px, width_px, height_px: the rectangle; it must lie inside the slide.
        margin: read the few source pixels around that the filter reaches for. Without it the
            rectangle's own border is repeated, and damage next door does no harm.

    Returns:
        uint8 (height_px, width_px, 3).

    Raises:
        SlideError: `decode_error`.
    """
    info = reader.info
    level = best_level(info, min(layout.scale_x, layout.scale_y))
    downsample = info.level_downsamples[level]
    ratio_x, ratio_y = layout.scale_x / downsample, layout.scale_y / downsample
    factor = _block_factor(ratio_x, ratio_y)
    level_width, level_height = info.level_dimensions[level]
    reach = int(margin)
    x0, columns, left = _source_span(x_px, width_px, ratio_x, factor, level_width, reach)
    y0, rows, top = _source_span(y_px, height_px, ratio_y, factor, level_height, reach)
    source = reader.read_reduced(level, x0, y0, columns * factor, rows * factor, factor)
    box_width, box_height = width_px * ratio_x / factor, height_px * ratio_y / factor
    return resample(source, (left, top, box_width, box_height), width_px, height_px)


def _block_factor(ratio_x: float, ratio_y: float) -> int:
    """By how much to average whole blocks of source pixels before the exact resampling.

    A whole ratio is done by averaging alone; a large one is brought down to 1.5 - 3.
    """
    ratio = min(ratio_x, ratio_y)
    whole = round(ratio)
    if whole >= 1 and abs(ratio_x - whole) < 1e-9 and abs(ratio_y - whole) < 1e-9:
        return whole
    return int(ratio / (BLOCK_RATIO / 2)) if ratio >= BLOCK_RATIO else 1


def _source_span(
    start_px: int, length_px: int, ratio: float, factor: int, limit: int, margin: int
) -> tuple[int, int, float]:
    """Source pixels to read along one axis.

    Returns:
        first source pixel, number of (reduced) pixels, and where the wanted span begins inside
        them, in reduced pixels.
    """
    begin, end = start_px * ratio, (start_px + length_px) * ratio
    reach = math.ceil(2 * ratio) * margin if abs(ratio - factor) > 1e-9 else 0
    # Blocks start at multiples of the factor, so that neighbouring chunks average the same ones.
    first = max(0, math.floor(begin + 1e-6) - reach) // factor * factor
    count = math.ceil((min(limit, math.ceil(end - 1e-6) + reach) - first) / factor)
    # The last block is whole; at the slide's far border it moves back inside.
    first = max(0, min(first, limit - count * factor))
    count = min(count, limit // factor)
    return first, count, (begin - first) / factor
