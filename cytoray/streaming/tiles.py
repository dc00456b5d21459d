"""A chunk of a slide becomes tiles ready to train on: read, detect, perturb, draw the views."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.errors import SlideError, raise_problems
from cytoray.nuclei import build_detector, read_nuclei
from cytoray.perturb import NUM_VIEW_PARAMS, CropPolicy, nuclei_centred_views, tile_rng
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
from cytoray.streaming.tile_pixels import OpenSlides

_NUCLEI_TABLES = 4


@dataclass(frozen=True, kw_only=True)
class PerturbConfig:
    """Nuclei-Centred Perturbation (Cyto-SSL, Algorithm 1).

    Attributes:
        enabled: shuffle the pixels far from every retained nucleus.
        radius_um: r; 12.5 um is the paper's 50 px at 40x.
        retain_fraction: range of the share of a tile's nuclei that is retained.
    """

    enabled: bool = True
    radius_um: float = 12.5
    retain_fraction: tuple[float, float] = (0.5, 1.0)

    def __post_init__(self) -> None:
        low, high = self.retain_fraction
        problems = []
        if not self.radius_um > 0:
            problems.append(f"perturb.radius_um must be above 0, not {self.radius_um:g}")
        if not 0 <= low <= high <= 1:
            problems.append(
                f"perturb.retain_fraction must be two numbers, 0 <= low <= high <= 1, not "
                f"{low:g} {high:g}"
            )
        raise_problems("the perturbation cannot be done:", problems)


@dataclass(frozen=True, kw_only=True)
class TileReaderConfig:
    """What is done to a tile on its way to training.

    Attributes:
        seed: the run's seed.
        policy: crops and augmentations.
        perturb: nuclei-centred perturbation.
        nuclei_dir: folder of the index's nuclei tables; empty: detect on the fly.
        detector: name of the detector used when there is no table.
        detector_kwargs: its options.
    """

    seed: int
    policy: CropPolicy
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    nuclei_dir: str = ""
    detector: str = "classical"
    detector_kwargs: dict[str, Any] = field(default_factory=dict)


class TileReader:
    """Reads chunks by their position in the reading order. Not to be shared between processes."""

    def __init__(self, plan: ReadPlan, order: ChunkOrder, config: TileReaderConfig) -> None:
        self.plan = plan
        self.order = order
        self.config = config
        self.slides = OpenSlides(plan)
        self.grid = self.slides.grid
        self._nuclei: OrderedDict[int, np.ndarray] = OrderedDict()
        self._detect = (
            None if config.nuclei_dir else build_detector(config.detector, **config.detector_kwargs)
        )

    def read(self, position: int) -> dict[str, np.ndarray]:
        """Tiles of the chunk at `position`, in an order of their own per epoch.

        Returns:
            Columns, one row a tile: `pixels` uint8 (n, S, S, 3); `views` float32 (n, V, P), see
            `cytoray.perturb.VIEW_PARAMS`; `tile_id` and `error` str (empty when the tile could be
            read); `num_nuclei` int32; `read_s`, `detect_s`, `perturb_s` float32, seconds spent on
            the tile. n is what the plan says, always: a tile that cannot be read has its error.
        """
        epochs, chunks = self.order.chunks(np.array([position]))
        epoch, chunk = int(epochs[0]), int(chunks[0])
        slide = int(self.plan.slide_of(chunks)[0])
        indices = mask_indices(int(self.plan.keep_mask[chunk]))
        slide_id = self.slides.row(slide)["slide_id"]
        rng = tile_rng(self.config.seed, epoch, f"{slide_id}:{chunk}")
        indices = indices[rng.permutation(len(indices))].tolist()
        return self._chunk_rows(slide, int(self.plan.chunk_index[chunk]), indices, epoch)

    def _chunk_rows(
        self, slide: int, chunk_index: int, indices: list[int], epoch: int
    ) -> dict[str, np.ndarray]:
        row = self.slides.row(slide)
        _, layout = self.slides.layout(slide)
        place = layout.chunk_at(chunk_index)
        begin = time.perf_counter()
        chunk, failure = None, ""
        try:
            # With its halo even when nuclei come from the table: the same pixels both ways
            chunk = self.slides.read(slide, place, halo_px=halo_px(self.grid.mpp))
        except SlideError as error:
            failure = str(error)
        read_s = time.perf_counter() - begin
        begin = time.perf_counter()
        nuclei = np.zeros((0, 4), np.float32)
        if chunk is not None:
            nuclei = self._nuclei_of(slide, row, chunk)
        detect_s = time.perf_counter() - begin
        name = chunk_id(row["slide_id"], self.grid, *place)
        tiles = []
        for index in indices:
            error = failure or (chunk.bad_tiles.get(index, "") if chunk else "")
            if chunk is None or error:
                tiles.append(self._unreadable(tile_id(name, index), error))
                continue
            corner = layout.tile_rect_px(*place, index)[:2]
            tiles.append(self._tile(tile_id(name, index), row, chunk, index, corner, nuclei, epoch))
        return _columns(tiles, read_s / len(tiles), detect_s / len(tiles))

    def _unreadable(self, name: str, error: str) -> dict[str, Any]:
        size = self.grid.tile_px
        return {
            "tile_id": name,
            "error": error,
            "pixels": np.zeros((size, size, 3), np.uint8),
            "views": np.zeros((self.config.policy.num_views, NUM_VIEW_PARAMS), np.float32),
            "num_nuclei": 0,
            "perturb_s": 0.0,
        }

    def _tile(
        self,
        name: str,
        row: dict[str, Any],
        chunk: ChunkPixels,
        index: int,
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
        made = nuclei_centred_views(
            chunk.tile(index),
            xy,
            self.config.perturb.radius_um / self.grid.mpp,
            self.config.policy,
            tile_rng(self.config.seed, epoch, name),
            retain_fraction=self.config.perturb.retain_fraction,
            perturbed=self.config.perturb.enabled,
        )
        return {
            "tile_id": name,
            "error": "",
            "pixels": made.tile,
            "views": made.views,
            "num_nuclei": len(xy),
            "perturb_s": time.perf_counter() - begin,
        }

    def _nuclei_of(self, slide: int, row: dict[str, Any], chunk: ChunkPixels) -> np.ndarray:
        mpp_slide = (row["mpp_x"], row["mpp_y"])
        core_px = chunk_core_px(chunk, self.grid)
        if self._detect is not None:
            return detect_in_chunk(
                self._detect, chunk, core_px=core_px, mpp=self.grid.mpp, mpp_slide=mpp_slide
            )
        if slide not in self._nuclei:
            path = Path(self.config.nuclei_dir) / f"{row['slide_id']}.parquet"
            self._nuclei[slide] = read_nuclei(path)
            while len(self._nuclei) > _NUCLEI_TABLES:
                self._nuclei.popitem(last=False)
        nuclei = self._nuclei[slide]
        return nuclei[inside_core(nuclei, core_px, mpp=self.grid.mpp, mpp_slide=mpp_slide)]


def _columns(part: list[dict[str, Any]], read_s: float, detect_s: float) -> dict[str, np.ndarray]:
    n = len(part)
    return {
        "tile_id": np.array([p["tile_id"] for p in part]),
        "error": np.array([p["error"] for p in part]),
        "pixels": np.stack([p["pixels"] for p in part]),
        "views": np.stack([p["views"] for p in part]).astype(np.float32),
        "num_nuclei": np.array([p["num_nuclei"] for p in part], np.int32),
        "read_s": np.full(n, read_s, np.float32),
        "detect_s": np.full(n, detect_s, np.float32),
        "perturb_s": np.array([p["perturb_s"] for p in part], np.float32),
    }
