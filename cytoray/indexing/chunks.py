"""What the chunks of a slide come to: nuclei, tiles kept, focus, planes, problems."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from cytoray.slides import SlideGrid, mask_indices
from cytoray.slides.focus import OUT_OF_FOCUS
from cytoray.streaming.chunk_nuclei import to_tile_frame

# Focus scores are kept as bytes: this many steps, and a value for "cannot be told".
FOCUS_STEPS = 250
UNKNOWN_FOCUS = 255


@dataclass
class SlideChunks:
    """What the chunks of a slide came to, in their order."""

    keep: list[int]
    layout: SlideGrid
    planes: list[int] | None = None
    problems: list[dict[str, Any]] = field(default_factory=list)
    out_of_focus: int = 0

    def __post_init__(self) -> None:
        self._found = [np.zeros((0, 4), np.float32)]
        self._focus: dict[int, dict[int, int]] = {}
        self.focus = np.full((self.layout.tile_rows, self.layout.tile_columns), np.nan, np.float32)

    def add(self, index: int, values: dict[str, Any], nuclei: np.ndarray) -> None:
        """Take in a chunk, fresh or from an earlier try."""
        self.keep[index] = values["keep"]
        self.problems += [dated(problem) for problem in values["problems"]]
        self.out_of_focus += values["blurred"]
        if self.planes is not None:
            self.planes[index] = values["plane"]
        self._found.append(nuclei)
        self._focus[index] = {int(tile): byte for tile, byte in values["focus"].items()}
        place = self.layout.chunk_at(index)
        for tile, byte in self._focus[index].items():
            column, row = self.layout.tile_position(*place, tile)
            self.focus[row, column] = np.nan if byte == UNKNOWN_FOCUS else byte / FOCUS_STEPS

    @property
    def num_kept(self) -> int:
        """Tiles kept."""
        return sum(mask.bit_count() for mask in self.keep)

    @property
    def nuclei(self) -> np.ndarray:
        """float32 (N, 4), by chunk."""
        return np.concatenate(self._found)

    def keep_with_nuclei(
        self, nuclei: np.ndarray, minimum: int, mpp_slide: tuple[float, float]
    ) -> None:
        """Leave out tiles with fewer than `minimum` nuclei.

        Args:
            nuclei: float32 (N, 4), centres in level-0 pixels.
            minimum: nuclei whose centre is in the tile.
            mpp_slide: um per level-0 pixel on x and y.
        """
        grid, counts = self.layout.grid, np.zeros(self.focus.shape, np.int64)
        xy = to_tile_frame(nuclei, mpp=grid.mpp, mpp_slide=mpp_slide, tile_x_px=0, tile_y_px=0)
        columns, rows = np.floor(xy / grid.tile_px).astype(np.int64).T
        height, width = counts.shape
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        np.add.at(counts, (rows[inside], columns[inside]), 1)
        enough = self.layout.chunk_keep_masks(counts, minimum)
        self.keep = [mask & other for mask, other in zip(self.keep, enough, strict=True)]

    def kept_focus(self) -> bytes:
        """One byte a kept tile, see `IndexedSlide.tile_focus`."""
        return bytes(
            self._focus[index][tile]
            for index, mask in enumerate(self.keep)
            if index in self._focus
            for tile in mask_indices(mask).tolist()
        )


def focus_byte(score: float) -> int:
    """A focus score in 0..1 as a whole number up to 250; 255 where it is not known (NaN)."""
    return UNKNOWN_FOCUS if np.isnan(score) else round(FOCUS_STEPS * float(score))


def focus_columns(focus: np.ndarray) -> dict[str, float | None]:
    """Columns of the slide table from the scores of a slide's tiles, NaN where there is none."""
    known = focus[~np.isnan(focus)]
    if not len(known):
        return {"focus_median": None, "out_of_focus_share": None}
    return {
        "focus_median": float(np.median(known)),
        "out_of_focus_share": float((known < OUT_OF_FOCUS).mean()),
    }


def dated(problem: dict[str, Any]) -> dict[str, Any]:
    """A quarantine row as it came from JSON, its time a time again."""
    return problem | {"time_utc": datetime.fromisoformat(problem["time_utc"])}
