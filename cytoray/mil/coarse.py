"""A coarser view of a bag, for aggregators of two scales (LESS)."""

from __future__ import annotations

import numpy as np

from cytoray.errors import InputError


def coarsen(
    features: np.ndarray, coordinates_level0: np.ndarray, tile_size_level0: float, factor: int = 2
) -> np.ndarray:
    """Average the features of neighbouring tiles: each `factor` x `factor` cell of the tile grid.

    A cell that lost tiles to the foreground filter is the mean of those it still has.

    Args:
        features: (N, D) floating point.
        coordinates_level0: (N, 2) top-left corners in level-0 pixels.
        tile_size_level0: tile side in level-0 pixels.
        factor: tiles a side of a cell.

    Returns:
        (M, D) float32, 1 <= M <= N, cells in row-major order.

    Raises:
        InputError: as many coordinates as features are needed, and a positive tile size.
    """
    if len(coordinates_level0) != len(features) or len(features) == 0:
        raise InputError(f"{len(coordinates_level0)} coordinates for {len(features)} features")
    if not tile_size_level0 > 0 or factor < 1:
        raise InputError(f"tile size {tile_size_level0} and factor {factor} must be positive")
    tiles = np.floor(np.asarray(coordinates_level0, np.float64) / tile_size_level0 + 1e-6)
    cells = (tiles // factor).astype(np.int64)[:, ::-1]
    _, cell_of_tile, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), features.shape[1]))
    np.add.at(sums, cell_of_tile.reshape(-1), features.astype(np.float64))
    return (sums / counts[:, None]).astype(np.float32)
