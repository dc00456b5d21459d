"""Where tiles and chunks lie: arithmetic on a slide's size and scale, no pixels.

Frames: level-0 pixels (`_level0`), and target pixels (`_px`) at the grid's mpp with the same
origin, the slide's top-left corner. Indices are row-major everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cytoray.errors import SlideError, raise_problems
from cytoray.slides.mpp import ResolvedMpp

CHUNK_TILES = 8
TILES_PER_CHUNK = CHUNK_TILES * CHUNK_TILES
# A slide may be this much coarser than the grid; beyond it, pixels would be invented.
MAX_ENLARGEMENT = 2.1
MIN_TILE_PX = 16
MAX_TILE_PX = 1024


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Non-overlapping square tiles.

    Attributes:
        tile_px: side of a tile in pixels at `mpp`.
        mpp: um per pixel of every tile.

    Raises:
        InputError: either is out of range.
    """

    tile_px: int = 224
    mpp: float = 0.5

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.tile_px, bool) or not isinstance(self.tile_px, int):
            problems.append(f"tile_px must be a whole number, not {self.tile_px!r}")
        elif not MIN_TILE_PX <= self.tile_px <= MAX_TILE_PX:
            problems.append(
                f"tile_px must be between {MIN_TILE_PX} and {MAX_TILE_PX}, not {self.tile_px}"
            )
        if not 0.05 <= self.mpp <= 20:
            problems.append(f"mpp must be between 0.05 and 20 um per pixel, not {self.mpp}")
        raise_problems("the tile grid is not usable:", problems)

    @property
    def chunk_px(self) -> int:
        """Side of a whole chunk in target pixels."""
        return CHUNK_TILES * self.tile_px


@dataclass(frozen=True, kw_only=True)
class SlideGrid:
    """A `Grid` laid on one slide. Only tiles wholly inside the slide exist.

    Attributes:
        grid: tile size and mpp.
        width_px_level0, height_px_level0: size of the slide.
        mpp_x, mpp_y: um per level-0 pixel.

    Raises:
        SlideError: `too_small` when no tile fits; `mpp_too_coarse` when the slide has less than
            half the asked resolution.
    """

    grid: Grid
    width_px_level0: int
    height_px_level0: int
    mpp_x: float
    mpp_y: float

    def __post_init__(self) -> None:
        if max(self.mpp_x, self.mpp_y) > self.grid.mpp * MAX_ENLARGEMENT:
            raise SlideError(
                "mpp_too_coarse",
                f"the slide has {max(self.mpp_x, self.mpp_y):.4g} um/px at its finest, too coarse "
                f"for tiles at {self.grid.mpp:g}; ask for a larger mpp",
            )
        if self.num_tiles == 0:
            raise SlideError(
                "too_small",
                f"the slide is {self.width_px}x{self.height_px} px at {self.grid.mpp:g} um/px, "
                f"smaller than one tile of {self.grid.tile_px} px",
            )

    @classmethod
    def of(cls, grid: Grid, width_px_level0: int, height_px_level0: int, mpp: ResolvedMpp):
        """The grid on a slide of this size and resolved scale."""
        return cls(
            grid=grid,
            width_px_level0=width_px_level0,
            height_px_level0=height_px_level0,
            mpp_x=mpp.mpp_x,
            mpp_y=mpp.mpp_y,
        )

    @property
    def scale_x(self) -> float:
        """Level-0 pixels per target pixel along x."""
        return self.grid.mpp / self.mpp_x

    @property
    def scale_y(self) -> float:
        """Level-0 pixels per target pixel along y."""
        return self.grid.mpp / self.mpp_y

    @property
    def width_px(self) -> int:
        """Whole target pixels across the slide."""
        return int(self.width_px_level0 / self.scale_x + 1e-6)

    @property
    def height_px(self) -> int:
        """Whole target pixels down the slide."""
        return int(self.height_px_level0 / self.scale_y + 1e-6)

    @property
    def tile_columns(self) -> int:
        return self.width_px // self.grid.tile_px

    @property
    def tile_rows(self) -> int:
        return self.height_px // self.grid.tile_px

    @property
    def num_tiles(self) -> int:
        return self.tile_columns * self.tile_rows

    @property
    def chunk_columns(self) -> int:
        return -(-self.tile_columns // CHUNK_TILES)

    @property
    def chunk_rows(self) -> int:
        return -(-self.tile_rows // CHUNK_TILES)

    @property
    def num_chunks(self) -> int:
        return self.chunk_columns * self.chunk_rows

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(chunk_column, chunk_row) of every chunk, row by row."""
        for index in range(self.num_chunks):
            yield self.chunk_at(index)

    def chunk_at(self, chunk_index: int) -> tuple[int, int]:
        """(chunk_column, chunk_row) of a row-major chunk index."""
        row, column = divmod(chunk_index, self.chunk_columns)
        if not 0 <= row < self.chunk_rows:
            raise IndexError(f"chunk {chunk_index} of {self.num_chunks}")
        return column, row

    def chunk_index(self, chunk_column: int, chunk_row: int) -> int:
        """Row-major index of a chunk, the position of its mask in `keep_masks`."""
        inside = 0 <= chunk_column < self.chunk_columns and 0 <= chunk_row < self.chunk_rows
        if not inside:
            raise IndexError(
                f"chunk {chunk_column}_{chunk_row} is outside {self.chunk_columns}x"
                f"{self.chunk_rows} chunks"
            )
        return chunk_row * self.chunk_columns + chunk_column

    def chunk_tiles(self, chunk_column: int, chunk_row: int) -> tuple[int, int]:
        """(columns, rows) of tiles that exist in a chunk; 8×8 but at the right and bottom."""
        self.chunk_index(chunk_column, chunk_row)
        columns = min(CHUNK_TILES, self.tile_columns - chunk_column * CHUNK_TILES)
        rows = min(CHUNK_TILES, self.tile_rows - chunk_row * CHUNK_TILES)
        return columns, rows

    def valid_mask(self, chunk_column: int, chunk_row: int) -> int:
        """Bits of the tiles that exist in a chunk."""
        columns, rows = self.chunk_tiles(chunk_column, chunk_row)
        line = (1 << columns) - 1
        return sum(line << (CHUNK_TILES * row) for row in range(rows))

    def tile_position(self, chunk_column: int, chunk_row: int, index: int) -> tuple[int, int]:
        """(tile_column, tile_row) on the slide of tile `index` (0..63) of a chunk."""
        row, column = divmod(index, CHUNK_TILES)
        return chunk_column * CHUNK_TILES + column, chunk_row * CHUNK_TILES + row

    def locate_tile(self, tile_column: int, tile_row: int) -> tuple[int, int, int]:
        """(chunk_column, chunk_row, index) of a tile; the inverse of `tile_position`."""
        index = (tile_row % CHUNK_TILES) * CHUNK_TILES + tile_column % CHUNK_TILES
        return tile_column // CHUNK_TILES, tile_row // CHUNK_TILES, index

    def tile_rect_px(
        self, chunk_column: int, chunk_row: int, index: int
    ) -> tuple[int, int, int, int]:
        """(x, y, width, height) of a tile in target pixels on the slide."""
        column, row = self.tile_position(chunk_column, chunk_row, index)
        side = self.grid.tile_px
        return column * side, row * side, side, side

    def tile_origin_level0(
        self, chunk_column: int, chunk_row: int, index: int
    ) -> tuple[float, float]:
        """(x, y) of a tile's top-left corner in level-0 pixels."""
        x, y, _, _ = self.tile_rect_px(chunk_column, chunk_row, index)
        return x * self.scale_x, y * self.scale_y

    def px_to_level0(self, xy_px: np.ndarray) -> np.ndarray:
        """Target pixels to level-0 pixels; (..., 2) to float64 (..., 2)."""
        return np.asarray(xy_px, np.float64) * (self.scale_x, self.scale_y)

    def level0_to_px(self, xy_level0: np.ndarray) -> np.ndarray:
        """Level-0 pixels to target pixels; (..., 2) to float64 (..., 2)."""
        return np.asarray(xy_level0, np.float64) / (self.scale_x, self.scale_y)

    @cached_property
    def _padded_shape(self) -> tuple[int, int, int, int]:
        return (self.chunk_rows, CHUNK_TILES, self.chunk_columns, CHUNK_TILES)

    def chunk_keep_masks(self, shares: np.ndarray, threshold: float) -> list[int]:
        """Keep masks of all chunks, row-major: bit i set where tile i has enough foreground.

        Args:
            shares: float (tile_rows, tile_columns), the foreground share of each tile.
            threshold: tiles with a share >= this are kept.
        """
        expected = (self.tile_rows, self.tile_columns)
        if shares.shape != expected:
            raise ValueError(f"shares {shares.shape} do not fit the grid {expected}")
        padded = np.zeros(
            (self.chunk_rows * CHUNK_TILES, self.chunk_columns * CHUNK_TILES), np.uint8
        )
        padded[: self.tile_rows, : self.tile_columns] = shares >= threshold
        bits = padded.reshape(self._padded_shape).transpose(0, 2, 1, 3)
        packed = np.packbits(bits.reshape(-1, TILES_PER_CHUNK), axis=1, bitorder="little")
        return [int.from_bytes(row.tobytes(), "little") for row in packed]

    def keep_array(self, keep_masks: list[int]) -> np.ndarray:
        """bool (tile_rows, tile_columns) from the masks; the inverse of `chunk_keep_masks`."""
        if len(keep_masks) != self.num_chunks:
            raise ValueError(f"{len(keep_masks)} masks for {self.num_chunks} chunks")
        bits = np.stack([mask_to_bool(mask) for mask in keep_masks])
        shape = (self.chunk_rows, self.chunk_columns, CHUNK_TILES, CHUNK_TILES)
        whole = bits.reshape(shape).transpose(0, 2, 1, 3)
        whole = whole.reshape(self.chunk_rows * CHUNK_TILES, self.chunk_columns * CHUNK_TILES)
        return whole[: self.tile_rows, : self.tile_columns]


def chunk_id(slide_id: str, grid: Grid, chunk_column: int, chunk_row: int) -> str:
    """Stable name of a chunk; it hangs on the slide's id, not on its path."""
    return f"{slide_id}:{grid.mpp:g}:{grid.tile_px}:{chunk_column}_{chunk_row}"


def tile_id(chunk: str, index: int) -> str:
    """Stable name of a tile (index 0..63) of the chunk named `chunk`."""
    return f"{chunk}:{index}"


def parse_tile_id(name: str) -> tuple[str, Grid, int, int, int]:
    """(slide_id, grid, chunk_column, chunk_row, index) of a tile id.

    Raises:
        ValueError: it is not a tile id.
    """
    try:
        slide_id, mpp, tile_px, place, index = name.rsplit(":", 4)
        column, row = place.split("_")
        grid = Grid(tile_px=int(tile_px), mpp=float(mpp))
        return slide_id, grid, int(column), int(row), int(index)
    except ValueError as error:
        raise ValueError(f"{name!r} is not a tile id") from error


def mask_to_bool(mask: int) -> np.ndarray:
    """bool (64,) of a keep mask."""
    data = np.frombuffer(int(mask).to_bytes(8, "little"), np.uint8)
    return np.unpackbits(data, bitorder="little").astype(bool)


def bool_to_mask(keep: np.ndarray) -> int:
    """Keep mask of a bool (64,) array."""
    packed = np.packbits(np.asarray(keep, bool).reshape(TILES_PER_CHUNK), bitorder="little")
    return int.from_bytes(packed.tobytes(), "little")


def mask_indices(mask: int) -> np.ndarray:
    """int64 (n,) indices of the set bits, ascending."""
    return np.flatnonzero(mask_to_bool(mask))
