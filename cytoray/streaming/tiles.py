"""A chunk of a slide becomes tiles ready to train on: read, detect, perturb, draw the views."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.errors import SlideError
from cytoray.nuclei import build_detector, read_nuclei
from cytoray.patience import ReadTries
from cytoray.perturb import NUM_VIEW_PARAMS, CropPolicy, PerturbConfig, tile_rng
from cytoray.slides import ChunkPixels, chunk_id, mask_indices, tile_id
from cytoray.streaming.chunk_nuclei import (
    chunk_core_px,
    detect_in_chunk,
    halo_px,
    inside_core,
    to_tile_frame,
)
from cytoray.streaming.order import ChunkOrder
from cytoray.streaming.plan import ReadPlan
from cytoray.streaming.tile_cache import TileCache, TileCacheConfig
from cytoray.streaming.tile_pixels import OpenSlides

_NUCLEI_TABLES = 4


@dataclass(frozen=True, kw_only=True)
class TileReaderConfig:
    """What is done to a tile on its way to training.

    Attributes:
        seed: the run's seed.
        policy: crops and augmentations.
        perturb: nuclei-centred perturbation.
        nuclei_dir: folder of the index's nuclei tables; empty: detect on the fly, where the
            perturbation needs nuclei.
        detector: name of the detector used when there is no table.
        detector_kwargs: its options.
        cache: keep tiles on the node's disk for later epochs; None: read the slides every time.
        tries: see `OpenSlides`.
    """

    seed: int
    policy: CropPolicy
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    nuclei_dir: str = ""
    detector: str = "classical"
    detector_kwargs: dict[str, Any] = field(default_factory=dict)
    cache: TileCacheConfig | None = None
    tries: ReadTries | None = None


@dataclass(frozen=True, kw_only=True)
class _ChunkSource:
    """A chunk before anything random: pixels of its kept tiles by index, and its nuclei.

    `failure` says why none could be read, `bad_tiles` why one could not.
    """

    tiles: dict[int, np.ndarray] = field(default_factory=dict)
    nuclei: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    bad_tiles: dict[int, str] = field(default_factory=dict)
    failure: str = ""
    cached: bool = False
    read_s: float = 0.0
    detect_s: float = 0.0


class TileReader:
    """Reads chunks by their position in the reading order. Not to be shared between processes."""

    def __init__(self, plan: ReadPlan, order: ChunkOrder, config: TileReaderConfig) -> None:
        self.plan = plan
        self.order = order
        self.config = config
        self.slides = OpenSlides(plan, config.tries)
        self.grid = self.slides.grid
        self._cache = None if config.cache is None else TileCache(config.cache)
        self._nuclei: OrderedDict[int, np.ndarray] = OrderedDict()
        self._knows_nuclei = config.perturb.enabled or bool(config.nuclei_dir)
        self._detect = None
        if config.perturb.enabled and not config.nuclei_dir:
            self._detect = build_detector(config.detector, **config.detector_kwargs)

    def num_tiles(self, position: int) -> int:
        """Tiles of the chunk at `position`."""
        return self.plan.tiles_in_chunk(int(self.order.chunks(np.array([position]))[1][0]))

    def read(self, position: int, pixels: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Tiles of the chunk at `position`, in an order of their own per epoch.

        Args:
            position: in the reading order.
            pixels: uint8 (n, S, S, 3), where to put the pixels; None: in memory of their own.

        Returns:
            Columns, one row a tile: `pixels` uint8 (n, S, S, 3); `views` float32 (n, V, P), see
            `cytoray.perturb.VIEW_PARAMS`; `tile_id` and `error` str (empty when the tile could be
            read); `num_nuclei` int32, -1 where nobody looked; `cached` bool, whether it came from
            the tile cache; `read_s`, `detect_s`, `perturb_s` float32, seconds spent on the tile.
            n is what the plan says, always: a tile that cannot be read has its error.
        """
        epochs, chunks = self.order.chunks(np.array([position]))
        epoch, chunk = int(epochs[0]), int(chunks[0])
        slide = int(self.plan.slide_of(chunks)[0])
        indices = mask_indices(int(self.plan.keep_mask[chunk]))
        slide_id = self.slides.row(slide)["slide_id"]
        rng = tile_rng(self.config.seed, epoch, f"{slide_id}:{chunk}")
        indices = indices[rng.permutation(len(indices))].tolist()
        return self._chunk_rows(slide, chunk, indices, epoch, pixels)

    def _chunk_rows(
        self, slide: int, number: int, indices: list[int], epoch: int, out: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        row = self.slides.row(slide)
        _, layout = self.slides.layout(slide)
        place = layout.chunk_at(int(self.plan.chunk_index[number]))
        source = self._cached(number, indices) or self._from_slide(slide, row, number, place)
        name = chunk_id(row["slide_id"], self.grid, *place)
        tiles = []
        for index in indices:
            pixels = source.tiles.get(index)
            if pixels is None:
                error = source.failure or source.bad_tiles[index]
                tiles.append(self._unreadable(tile_id(name, index), error))
                continue
            corner = layout.tile_rect_px(*place, index)[:2]
            made = self._tile(tile_id(name, index), row, pixels, corner, source.nuclei, epoch)
            tiles.append(made)
        return _columns(tiles, source, out)

    def _from_slide(
        self, slide: int, row: dict[str, Any], number: int, place: tuple[int, int]
    ) -> _ChunkSource:
        """Read a chunk and find its nuclei; what is whole goes into the cache."""
        begin = time.perf_counter()
        try:
            # With its halo even when nuclei come from the table: the same pixels both ways
            chunk = self.slides.read(slide, place, halo_px=halo_px(self.grid.mpp))
        except SlideError as error:
            return _ChunkSource(failure=str(error), read_s=time.perf_counter() - begin)
        read_s = time.perf_counter() - begin
        begin = time.perf_counter()
        nuclei = self._nuclei_of(slide, row, chunk)
        detect_s = time.perf_counter() - begin
        kept = mask_indices(int(self.plan.keep_mask[number])).tolist()
        bad = {i: chunk.bad_tiles[i] for i in kept if i in chunk.bad_tiles}
        if self._cache is not None and not bad:
            self._cache.put(number, chunk.tiles(kept), nuclei)
        return _ChunkSource(
            tiles={i: chunk.tile(i) for i in kept if i not in bad},
            nuclei=nuclei,
            bad_tiles=bad,
            read_s=read_s,
            detect_s=detect_s,
        )

    def _cached(self, number: int, indices: list[int]) -> _ChunkSource | None:
        begin = time.perf_counter()
        found = self._cache.get(number) if self._cache is not None else None
        if found is None or len(found.pixels) != len(indices):
            return None
        return _ChunkSource(
            tiles=dict(zip(sorted(indices), found.pixels, strict=True)),
            nuclei=found.nuclei,
            cached=True,
            read_s=time.perf_counter() - begin,
        )

    def _unreadable(self, name: str, error: str) -> dict[str, Any]:
        size = self.grid.tile_px
        return {
            "tile_id": name,
            "error": error,
            "pixels": np.zeros((size, size, 3), np.uint8),
            "views": np.zeros((self.config.policy.num_views, NUM_VIEW_PARAMS), np.float32),
            "num_nuclei": -1,
            "perturb_s": 0.0,
        }

    def _tile(
        self,
        name: str,
        row: dict[str, Any],
        pixels: np.ndarray,
        corner_px: tuple[int, int],
        nuclei_level0: np.ndarray,
        epoch: int,
    ) -> dict[str, Any]:
        begin = time.perf_counter()
        size = self.grid.tile_px
        xy = to_tile_frame(
            nuclei_level0,
            mpp=self.grid.mpp,
            mpp_slide=(row["mpp_x"], row["mpp_y"]),
            tile_x_px=corner_px[0],
            tile_y_px=corner_px[1],
        )
        xy = xy[np.all((xy >= 0) & (xy < size), axis=1)]
        rng = tile_rng(self.config.seed, epoch, name)
        made = self.config.perturb.views(pixels, xy, self.config.policy, rng, mpp=self.grid.mpp)
        return {
            "tile_id": name,
            "error": "",
            "pixels": made.tile,
            "views": made.views,
            "num_nuclei": len(xy) if self._knows_nuclei else -1,
            "perturb_s": time.perf_counter() - begin,
        }

    def _nuclei_of(self, slide: int, row: dict[str, Any], chunk: ChunkPixels) -> np.ndarray:
        mpp_slide = (row["mpp_x"], row["mpp_y"])
        core_px = chunk_core_px(chunk, self.grid)
        if self._detect is not None:
            return detect_in_chunk(
                self._detect, chunk, core_px=core_px, mpp=self.grid.mpp, mpp_slide=mpp_slide
            )
        if not self._knows_nuclei:
            return np.zeros((0, 4), np.float32)
        if slide not in self._nuclei:
            path = Path(self.config.nuclei_dir) / f"{row['slide_id']}.parquet"
            self._nuclei[slide] = read_nuclei(path)
            while len(self._nuclei) > _NUCLEI_TABLES:
                self._nuclei.popitem(last=False)
        nuclei = self._nuclei[slide]
        return nuclei[inside_core(nuclei, core_px, mpp=self.grid.mpp, mpp_slide=mpp_slide)]


def _columns(
    part: list[dict[str, Any]], source: _ChunkSource, pixels: np.ndarray | None
) -> dict[str, np.ndarray]:
    n = len(part)
    return {
        "tile_id": np.array([p["tile_id"] for p in part]),
        "error": np.array([p["error"] for p in part]),
        "pixels": np.stack([p["pixels"] for p in part], out=pixels),
        "views": np.stack([p["views"] for p in part]).astype(np.float32),
        "num_nuclei": np.array([p["num_nuclei"] for p in part], np.int32),
        "cached": np.full(n, source.cached),
        "read_s": np.full(n, source.read_s / n, np.float32),
        "detect_s": np.full(n, source.detect_s / n, np.float32),
        "perturb_s": np.array([p["perturb_s"] for p in part], np.float32),
    }
