"""Tiles of a slide as a trial sees them: where pixels come from, and how they are embedded.

Shapes: k tiles, S tile side in pixels, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from cytoray.models.prefix import features_from
from cytoray.precision import autocast

if TYPE_CHECKING:
    from cytoray.mil.prefix import FrozenPrefix


class TileSource(Protocol):
    """Where a trial gets its pixels from."""

    def num_tiles(self, slide_id: str) -> int:
        """How many tiles the slide's bag has."""
        ...

    def __call__(self, slide_id: str, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Pixels of the tiles at `indices` (k,), each in 0..num_tiles-1: uint8 (k, S, S, 3)."""
        ...


class ArrayTileSource:
    """Tiles held in memory.

    Args:
        tiles: uint8 (N, S, S, 3) of each slide.
    """

    def __init__(self, tiles: Mapping[str, np.ndarray]) -> None:
        self.tiles = tiles

    def num_tiles(self, slide_id: str) -> int:
        """See `TileSource`."""
        return len(self.tiles[slide_id])

    def __call__(self, slide_id: str, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """See `TileSource`."""
        return self.tiles[slide_id][indices]


def spread_indices(num_tiles: int, limit: int) -> np.ndarray:
    """At most `limit` tile indices, evenly spread over the bag: (k,) int64."""
    return np.linspace(0, num_tiles - 1, min(limit, num_tiles)).round().astype(np.int64)


def turn_and_flip(tiles: Tensor, rng: np.random.Generator) -> Tensor:
    """Give each square tile (k, S, S, 3) one of the eight turns and flips at random."""
    which = torch.from_numpy(rng.integers(0, 8, tiles.shape[0])).to(tiles.device)
    out = tiles.clone()
    for variant in range(1, 8):
        chosen = which == variant
        turned = torch.rot90(tiles[chosen], variant % 4, dims=(1, 2))
        out[chosen] = turned.flip(2) if variant >= 4 else turned
    return out


@torch.no_grad()
def embed_tiles(
    encoder: nn.Module,
    tile_source: TileSource,
    slide_id: str,
    indices: np.ndarray,
    *,
    batch_tiles: int = 128,
    precision: str = "auto",
    rng: np.random.Generator | None = None,
    prefix: FrozenPrefix | None = None,
) -> Tensor:
    """Features of some tiles of a slide, in batches: (k, D) float32 on the CPU.

    Args:
        encoder: uint8 (B, H, W, 3) to (B, D); its mode is left as it is.
        tile_source: gives the pixels, one batch at a time.
        slide_id: the slide.
        indices: (k,) tiles, k >= 1.
        batch_tiles: tiles a forward.
        precision: `auto`, `fp32` or `bf16`.
        rng: handed to the tile source.
        prefix: activations of the encoder's frozen blocks, used where it holds the tiles.
    """
    device = next(encoder.parameters()).device
    rng = rng or np.random.default_rng(0)
    features = []
    for start in range(0, len(indices), batch_tiles):
        chosen = indices[start : start + batch_tiles]
        tokens = prefix(slide_id, chosen) if prefix is not None else None
        pixels = tile_source(slide_id, chosen, rng) if tokens is None else None
        with autocast(precision, device):
            if prefix is not None and tokens is not None:
                batch = features_above(encoder, prefix, tokens)
            else:
                batch = encoder(torch.from_numpy(pixels).to(device))
        features.append(batch.float().cpu())
    return torch.cat(features)


def features_above(encoder: nn.Module, prefix: FrozenPrefix, tokens: np.ndarray) -> Tensor:
    """Features (k, D) from what a prefix holds of the tiles."""
    device = next(encoder.parameters()).device
    batch = torch.from_numpy(tokens).to(device).float()
    return features_from(cast(Any, encoder), batch, prefix.depth)
