"""Plain tiles of chunks and of tile ids: what embedding and end-to-end tuning read."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa

from cytoray.errors import SlideError
from cytoray.patience import ReadTries
from cytoray.slides import (
    ChunkPixels,
    Grid,
    ResolvedMpp,
    SlideGrid,
    SlideReader,
    StackReader,
    chunk_id,
    mask_indices,
    open_row,
    parse_tile_id,
    read_chunk,
    read_region_px,
    tile_id,
)
from cytoray.slides.remote import stage
from cytoray.streaming.plan import ReadPlan

_OPEN_SLIDES = 4
SLIDE_COLUMNS = ("slide_id", "path", "mpp_x", "mpp_y", "mpp_source", "reader",
                 "width_px_level0", "height_px_level0")  # fmt: skip
# Of slides with several focal planes: their files (null where one file holds them), and the plane
# to read of every chunk. Both null for plain slides.
STACK_COLUMNS = ("z_paths", "z_planes")


class OpenSlides:
    """The few slides a process has open, least recently used closed first.

    Args:
        plan: the slides.
        tries: ends this process where reading a chunk hangs, and gives up slides that ended enough
            of them; None in a process that nobody would start again.
    """

    def __init__(self, plan: ReadPlan, tries: ReadTries | None = None) -> None:
        self.plan = plan
        self.tries = tries
        self.grid = Grid(tile_px=plan.tile_px, mpp=plan.mpp)
        self._open: OrderedDict[int, SlideReader] = OrderedDict()

    def row(self, slide: int) -> dict[str, Any]:
        """The slide's row of the slide table, as far as reading needs it."""
        slides = self.plan.slides
        return {name: slides.column(name)[slide].as_py() for name in SLIDE_COLUMNS}

    def layout(self, slide: int) -> tuple[ResolvedMpp, SlideGrid]:
        """Scale and grid of a slide."""
        row = self.row(slide)
        scale = ResolvedMpp(mpp_x=row["mpp_x"], mpp_y=row["mpp_y"], source=row["mpp_source"])
        return scale, SlideGrid.of(
            self.grid, row["width_px_level0"], row["height_px_level0"], scale
        )

    def read(self, slide: int, place: tuple[int, int], *, halo_px: int = 0) -> ChunkPixels:
        """Read the chunk at (column, row) of a slide.

        Raises:
            SlideError: the slide cannot be opened any more, or was given up (see `ReadTries`).
        """
        scale, layout = self.layout(slide)
        chunk_index = layout.chunk_index(*place)
        with ExitStack() as held:
            if self.tries is not None:
                if slide not in self._open:  # downloads have time limits of their own
                    for path in self._paths(slide):
                        held.enter_context(stage(path))
                held.enter_context(self.tries.reading(slide, chunk_index))
            return read_chunk(
                self._reader(slide),
                scale,
                self.grid,
                *place,
                halo_px=halo_px,
                z_index=self._plane(slide, chunk_index),
            )

    def read_tile(self, slide: int, name: str) -> np.ndarray:
        """Read one tile by its id; uint8 (S, S, 3).

        Raises:
            SlideError: the slide cannot be opened, or the tile cannot be decoded.
        """
        _, _, column, row, index = parse_tile_id(name)
        _, layout = self.layout(slide)
        rectangle = layout.tile_rect_px(column, row, index)
        reader = self._reader(slide)
        if isinstance(reader, StackReader):
            z_index = self._plane(slide, layout.chunk_index(column, row))
            if z_index is None:
                z_index = self.read(slide, (column, row)).z_index
            reader = reader.from_plane(z_index)
        return read_region_px(reader, layout, *rectangle)

    def thumbnail(self, slide: int, max_px: int) -> np.ndarray:
        """The whole slide, small; uint8 (h, w, 3)."""
        return self._reader(slide).thumbnail(max_px)

    def _reader(self, slide: int) -> SlideReader:
        if slide in self._open:
            self._open.move_to_end(slide)
        else:
            self._close(keep=_OPEN_SLIDES - 1)
            try:
                self._open[slide] = self._opened(slide)
            except SlideError as error:
                if error.code != "cache_busy":
                    raise
                self._close(keep=0)  # else processes that want room wait for each other
                self._open[slide] = self._opened(slide)
        return self._open[slide]

    def _paths(self, slide: int) -> list[str]:
        """The slide's files: one, or one a focal plane."""
        return self._value("z_paths", slide).as_py() or [self.row(slide)["path"]]

    def _opened(self, slide: int) -> SlideReader:
        row = self.row(slide) | {"z_paths": self._value("z_paths", slide).as_py()}
        return open_row(row, reader=row["reader"], verify=False)

    def _close(self, keep: int) -> None:
        while len(self._open) > keep:
            self._open.popitem(last=False)[1].close()

    def _plane(self, slide: int, chunk_index: int) -> int | None:
        """The focal plane the index chose for a chunk; None where there was nothing to choose."""
        planes = self._value("z_planes", slide)
        return planes.values[chunk_index].as_py() if planes.is_valid else None

    def _value(self, name: str, slide: int) -> Any:
        """An Arrow scalar of a column that the table need not have."""
        slides = self.plan.slides
        return slides.column(name)[slide] if name in slides.column_names else pa.scalar(None)


class ChunkTiles:
    """Kept tiles of a chunk, as they are on the slide; for the arguments see `OpenSlides`."""

    def __init__(self, plan: ReadPlan, tries: ReadTries | None = None) -> None:
        self.plan = plan
        self.slides = OpenSlides(plan, tries)

    def read(self, position: int) -> dict[str, np.ndarray]:
        """Tiles of one chunk.

        Args:
            position: index into `plan.chunk_numbers` (the chunk number itself when that is None).

        Returns:
            Columns, one row a tile: `slide` int64 (row of the slide table), `tile_id`, `error` str,
            `corner_level0` float32 (n, 2), `pixels` uint8 (n, S, S, 3).
        """
        numbers = self.plan.chunk_numbers
        number = position if numbers is None else int(numbers[position])
        slide = int(self.plan.slide_of(np.array([number]))[0])
        _, layout = self.slides.layout(slide)
        place = layout.chunk_at(int(self.plan.chunk_index[number]))
        indices = mask_indices(int(self.plan.keep_mask[number])).tolist()
        name = chunk_id(self.slides.row(slide)["slide_id"], self.slides.grid, *place)
        try:
            chunk, failure = self.slides.read(slide, place), ""
        except SlideError as error:
            chunk, failure = None, str(error)
        size = self.plan.tile_px
        pixels = np.empty((len(indices), size, size, 3), np.uint8)
        errors = []
        for i, index in enumerate(indices):
            errors.append(failure or (chunk.bad_tiles.get(index, "") if chunk else ""))
            pixels[i] = 0 if chunk is None or errors[-1] else chunk.tile(index)
        return {
            "slide": np.full(len(indices), slide, np.int64),
            "tile_id": np.array([tile_id(name, index) for index in indices]),
            "error": np.array(errors),
            "corner_level0": np.array(
                [layout.tile_origin_level0(*place, index) for index in indices], np.float32
            ),
            "pixels": pixels,
        }


class BagTiles:
    """Tiles of bags by slide and position in the bag, read from the slides when asked for.

    Implements `cytoray.mil.TileSource`.

    Args:
        plan: the slides; every slide of `tile_ids` must be in it.
        tile_ids: slide_id -> tile ids in the order of the bag.
    """

    def __init__(self, plan: ReadPlan, tile_ids: dict[str, list[str]]) -> None:
        self._slides = OpenSlides(plan)
        self._number = {s: i for i, s in enumerate(plan.slides.column("slide_id").to_pylist())}
        self._tile_ids = tile_ids

    def num_tiles(self, slide_id: str) -> int:
        """Tiles of the slide's bag."""
        return len(self._tile_ids[slide_id])

    def __call__(self, slide_id: str, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Pixels of the tiles at `indices` (k,) of the bag: uint8 (k, S, S, 3).

        Raises:
            SlideError: a tile cannot be decoded (it could when the slide was embedded).
        """
        slide = self._number[slide_id]
        names = self._tile_ids[slide_id]
        return np.stack([self._slides.read_tile(slide, names[i]) for i in indices.tolist()])


class KeptTiles:
    """All kept tiles of a plan's slides, by slide and place in reading order, read when asked for.

    Implements `cytoray.mil.TileSource`; holds no list of tiles.

    Args:
        plan: the slides.
    """

    def __init__(self, plan: ReadPlan) -> None:
        self._slides, self._plan = OpenSlides(plan), plan
        self._number = {s: i for i, s in enumerate(plan.slides.column("slide_id").to_pylist())}

    def num_tiles(self, slide_id: str) -> int:
        """Kept tiles of the slide."""
        return int(self._counts(self._number[slide_id]).sum())

    def __call__(self, slide_id: str, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Pixels of the tiles at `indices` (k,): uint8 (k, S, S, 3).

        Raises:
            SlideError: a tile cannot be decoded.
        """
        slide = self._number[slide_id]
        return np.stack(
            [self._slides.read_tile(slide, self._name(slide, i)) for i in indices.tolist()]
        )

    def _counts(self, slide: int) -> np.ndarray:
        start, stop = self._plan.first_chunk[slide : slide + 2]
        return np.bitwise_count(self._plan.keep_mask[start:stop]).astype(np.int64)

    def _name(self, slide: int, index: int) -> str:
        """Tile id of the kept tile at `index`."""
        ends = self._counts(slide).cumsum()
        place = int(np.searchsorted(ends, index, side="right"))
        number = int(self._plan.first_chunk[slide]) + place
        mask = int(self._plan.keep_mask[number])
        within = mask_indices(mask)[index - (int(ends[place - 1]) if place else 0)]
        _, layout = self._slides.layout(slide)
        chunk = layout.chunk_at(int(self._plan.chunk_index[number]))
        name = chunk_id(self._slides.row(slide)["slide_id"], self._slides.grid, *chunk)
        return tile_id(name, int(within))
