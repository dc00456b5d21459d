from __future__ import annotations

import cv2
import numpy as np
import pytest

from cytoray.perturb import inside_tile
from cytoray.slides import ChunkPixels, Grid, ResolvedMpp, SlideGrid
from cytoray.streaming.chunk_nuclei import (
    chunk_core_px,
    detect_in_chunk,
    halo_px,
    inside_core,
    to_tile_frame,
)

GRID = Grid(tile_px=32, mpp=0.5)


def detect_dots(pixels: np.ndarray, mpp: float) -> np.ndarray:
    """A detector for black dots on white: float32 (N, 4), x_px, y_px, radius_um, score."""
    dark = (pixels[..., 0] < 128).astype(np.uint8)
    _, _, stats, centres = cv2.connectedComponentsWithStats(dark)
    area = stats[1:, cv2.CC_STAT_AREA]
    radius = np.sqrt(area / np.pi) * mpp
    return np.column_stack([centres[1:], radius, np.ones(len(area))]).astype(np.float32)


def picture(layout: SlideGrid, centres_px: np.ndarray) -> np.ndarray:
    """The slide at the grid's mpp: 5 px crosses centred on whole pixels."""
    image = np.full((layout.height_px, layout.width_px, 3), 255, np.uint8)
    for x, y in centres_px:
        cv2.drawMarker(image, (int(x), int(y)), (0, 0, 0), cv2.MARKER_CROSS, 5, 1)
    return image


def chunk_of(image: np.ndarray, grid: Grid, column: int, row: int, halo: int) -> ChunkPixels:
    left, top = column * grid.chunk_px, row * grid.chunk_px
    x0, y0 = max(0, left - halo), max(0, top - halo)
    return ChunkPixels(
        pixels=image[y0 : top + grid.chunk_px + halo, x0 : left + grid.chunk_px + halo],
        origin_x_px=x0,
        origin_y_px=y0,
        chunk_x_px=left,
        chunk_y_px=top,
        tile_px=grid.tile_px,
    )


@pytest.mark.parametrize("mpp_slide", [(0.5, 0.5), (0.25, 0.25), (0.37, 0.41)])
def test_every_nucleus_is_found_in_one_chunk_at_its_place(rng, mpp_slide) -> None:
    """Borders of chunks included: a dot on the border is cut in neither and counted in one."""
    scale = ResolvedMpp(mpp_x=mpp_slide[0], mpp_y=mpp_slide[1], source="file")
    side = 2 * GRID.chunk_px
    size = (int(side * GRID.mpp / mpp_slide[0]) + 4, int(side * GRID.mpp / mpp_slide[1]) + 4)
    layout = SlideGrid.of(GRID, *size, scale)
    free = np.stack(np.meshgrid(*[np.arange(8, side - 8, 24)] * 2), axis=-1).reshape(-1, 2)
    border = np.array([[256, 50], [255, 90], [100, 256], [180, 255], [256, 256]])
    keep = np.abs(free[:, None] - border[None]).max(axis=2).min(axis=1) > 12
    truth_px = np.concatenate([free[keep], border])
    image = picture(layout, truth_px)
    found = []
    for column, row in layout.chunks():
        chunk = chunk_of(image, GRID, column, row, halo_px(GRID.mpp))
        core = chunk_core_px(chunk, GRID)
        nuclei = detect_in_chunk(
            detect_dots, chunk, core_px=core, mpp=GRID.mpp, mpp_slide=mpp_slide
        )
        assert inside_core(nuclei, core, mpp=GRID.mpp, mpp_slide=mpp_slide).all()
        found.append(nuclei)
    nuclei = np.concatenate(found)
    assert len(nuclei) == len(truth_px)
    # The centre of pixel i lies (i + 0.5) * 0.5 um from the slide's corner, in both frames.
    truth_um = (truth_px + 0.5) * GRID.mpp
    found_um = (nuclei[:, :2] + 0.5) * mpp_slide
    distance = np.linalg.norm(truth_um[:, None] - found_um[None], axis=2).min(axis=1)
    assert distance.max() < 1e-3


def test_chunks_and_tiles_share_the_plane_without_gap_or_overlap(rng) -> None:
    """Any point, also one on a border or half a pixel before it, is in one chunk and one tile."""
    mpp_slide = (0.2532, 0.2532)
    scale = ResolvedMpp(mpp_x=mpp_slide[0], mpp_y=mpp_slide[1], source="file")
    layout = SlideGrid.of(GRID, 2100, 1700, scale)
    points = rng.uniform(1, [1900, 1000], (5000, 2))
    borders_px = np.arange(1, 4) * GRID.chunk_px - np.array([[0.0], [0.25], [0.5]])
    borders = (borders_px.ravel() + 0.5) * layout.scale_x - 0.5
    points = np.concatenate([points, np.stack([borders, np.full(9, 40.0)], axis=1)])
    nuclei = np.column_stack([points, np.ones((len(points), 2))]).astype(np.float32)
    owners, in_tiles = np.zeros(len(nuclei), int), np.zeros(len(nuclei), int)
    for column in range(4):
        for row in range(4):
            core = (
                column * GRID.chunk_px,
                row * GRID.chunk_px,
                (column + 1) * GRID.chunk_px,
                (row + 1) * GRID.chunk_px,
            )
            mine = inside_core(nuclei, core, mpp=GRID.mpp, mpp_slide=mpp_slide)
            owners += mine
            for x in range(core[0], core[2], GRID.tile_px):
                for y in range(core[1], core[3], GRID.tile_px):
                    xy = to_tile_frame(
                        nuclei, mpp=GRID.mpp, mpp_slide=mpp_slide, tile_x_px=x, tile_y_px=y
                    )
                    in_tiles += mine & inside_tile(xy, GRID.tile_px)
    assert set(owners.tolist()) == {1}
    assert set(in_tiles.tolist()) == {1}


def test_tile_frame_is_the_array_index() -> None:
    """A nucleus detected at array index (37, 41) of the slide lies there in the tile as well."""
    mpp_slide = (0.25, 0.25)
    index_px = np.array([[37.0, 41.0], [64.0, 32.0], [63.5, 31.5]])
    level0 = (index_px + 0.5) * (GRID.mpp / 0.25) - 0.5
    nuclei = np.column_stack([level0, np.ones((3, 2))]).astype(np.float32)
    there = to_tile_frame(nuclei, mpp=GRID.mpp, mpp_slide=mpp_slide, tile_x_px=32, tile_y_px=32)
    assert np.allclose(there, index_px - 32, atol=1e-4)


def test_halo_covers_the_largest_nucleus() -> None:
    assert halo_px(0.5) == 32
    assert halo_px(0.25) == 64


def test_no_nucleus_is_an_empty_array() -> None:
    image = np.full((256, 256, 3), 255, np.uint8)
    chunk = chunk_of(image, GRID, 0, 0, 0)
    nuclei = detect_in_chunk(
        detect_dots, chunk, core_px=(0, 0, 256, 256), mpp=0.5, mpp_slide=(0.5, 0.5)
    )
    assert nuclei.shape == (0, 4)
    assert nuclei.dtype == np.float32
