"""Activations below the adapted blocks, computed once and read by every trial that shares them.

Shapes: k tiles, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cytoray.mil.tiles import TileSource
from cytoray.models.prefix import prefix_tokens, tokens_shape
from cytoray.precision import autocast

if TYPE_CHECKING:
    from cytoray.models.encoder import Encoder


@dataclass(frozen=True)
class FrozenPrefix:
    """What enters the first adapted block, for some tiles of some slides, as the slide has them.

    A trial that turns and flips its training tiles can use it to evaluate only.

    Attributes:
        depth: blocks below the first adapted one.
        tiles: (k,) rising tile indices that are held, by slide.
        load: slide_id -> (k, N, D) of those tiles, float16 or float32.
    """

    depth: int
    tiles: Mapping[str, np.ndarray]
    load: Callable[[str], np.ndarray]

    def __call__(self, slide_id: str, indices: np.ndarray) -> np.ndarray | None:
        """Activations of the tiles at `indices`, or None where one of them is not held."""
        held = self.tiles.get(slide_id)
        if held is None or not len(held):
            return None
        places = np.minimum(np.searchsorted(held, indices), len(held) - 1)
        if not np.array_equal(held[places], indices):
            return None
        return self.load(slide_id)[places]


@torch.no_grad()
def compute_prefix(
    encoder: Encoder,
    tile_source: TileSource,
    slide_id: str,
    indices: np.ndarray,
    depth: int,
    *,
    batch_tiles: int = 128,
    precision: str = "auto",
    dtype: type[np.floating] = np.float16,
) -> np.ndarray | None:
    """Activations of some tiles of a slide: (k, N, D), or None where `dtype` cannot hold them.

    Args:
        encoder: not yet adapted, in evaluation mode, without `prefix_obstacle`.
        tile_source: gives the pixels, one batch at a time.
        slide_id: the slide.
        indices: (k,) tiles.
        depth: blocks to run.
        batch_tiles: tiles a forward.
        precision: of the forward: `auto`, `fp32` or `bf16`.
        dtype: of the result; float16 changes a feature by about 1e-3 of its size.
    """
    device, rng = encoder.mean.device, np.random.default_rng(0)
    out = np.empty((len(indices), *tokens_shape(encoder)), dtype)
    for start in range(0, len(indices), batch_tiles):
        pixels = tile_source(slide_id, indices[start : start + batch_tiles], rng)
        with autocast(precision, device):
            tokens = prefix_tokens(encoder, torch.from_numpy(pixels).to(device), depth)
        with np.errstate(over="ignore"):
            out[start : start + batch_tiles] = tokens.float().cpu().numpy()
    return out if np.isfinite(out).all() else None
