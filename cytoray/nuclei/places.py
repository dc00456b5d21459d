"""Which nuclei lie where: rectangles of a slide and the tiles of a chunk."""

from __future__ import annotations

import numpy as np


def sort_nuclei(nuclei: np.ndarray) -> np.ndarray:
    """Nuclei (N, 4) sorted by y, then x, for `nuclei_in_rectangle`."""
    return nuclei[np.lexsort((nuclei[:, 0], nuclei[:, 1]))]


def nuclei_in_rectangle(
    nuclei: np.ndarray, x0: float, y0: float, x1: float, y1: float
) -> np.ndarray:
    """Nuclei with x0 <= x < x1 and y0 <= y < y1.

    Args:
        nuclei: float (N, C), x and y first, sorted by `sort_nuclei`.
        x0: left, in the frame of `nuclei`.
        y0: top.
        x1: right, outside.
        y1: bottom, outside.

    Returns:
        The rows inside, (M, C), still sorted. Only the band of rows y0 to y1 is looked at.
    """
    first, last = np.searchsorted(nuclei[:, 1], np.array([y0, y1], nuclei.dtype))
    band = nuclei[first:last]
    return band[(band[:, 0] >= x0) & (band[:, 0] < x1)]


def assign_to_tiles(
    xy_px: np.ndarray,
    origin_x_px: float,
    origin_y_px: float,
    tile_px: int,
    columns: int,
    rows: int,
) -> list[np.ndarray]:
    """Sort points into a grid of tiles.

    Args:
        xy_px: float (N, 2).
        origin_x_px: left edge of the first tile, in the frame of `xy_px`.
        origin_y_px: top edge of the first tile.
        tile_px: side of a tile.
        columns: tiles in a row.
        rows: tiles in a column.

    Returns:
        rows * columns arrays (row-major) of int64 indices into `xy_px`, ascending. A point on an
        edge belongs to the tile right of or below it; points outside the grid to none.
    """
    xy_px = np.asarray(xy_px).reshape(-1, 2)
    column = np.floor((xy_px[:, 0] - origin_x_px) / tile_px)
    row = np.floor((xy_px[:, 1] - origin_y_px) / tile_px)
    inside = np.flatnonzero((column >= 0) & (column < columns) & (row >= 0) & (row < rows))
    tile = (row[inside] * columns + column[inside]).astype(np.int64)
    order = np.argsort(tile, kind="stable")
    counts = np.bincount(tile, minlength=rows * columns)
    return np.split(inside[order], np.cumsum(counts)[:-1])
