"""A labelled data set ready for trials: images that can be read, their split, pixels by size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.errors import raise_problems
from cytoray.evaluation.splits import Split
from cytoray.finetune.cells import Cells
from cytoray.finetune.pixels import Bad, cached_pixels


class RowsOf:
    """Some rows of an array, read when asked for.

    Args:
        array: (R, ...).
        rows: (N,) rows that count.
    """

    def __init__(self, array: np.ndarray, rows: np.ndarray) -> None:
        self.array, self.rows = array, rows
        self.shape = (len(rows), *array.shape[1:])

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.array[self.rows[index]]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class CellData:
    """What every trial of a run works on. Pixels stay in files that the trials map.

    Attributes:
        cells: the readable images.
        rows: (N,) their rows in the pixel files.
        pixels: file of uint8 (R, S, S, 3) by side S.
    """

    cells: Cells
    rows: np.ndarray
    pixels: dict[int, Path]

    def images(self, side_px: int) -> Any:
        """Pixels of the images at one of the prepared sizes; index it like (N, S, S, 3) uint8."""
        return RowsOf(np.load(self.pixels[side_px], mmap_mode="r"), self.rows)


def prepare_cells(
    cells: Cells,
    sides_px: Sequence[int],
    folder: Path,
    *,
    fit: str = "squash",
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[CellData, list[Bad]]:
    """Decode all images at every size that is needed, and leave out what cannot be read.

    Args:
        cells: all images.
        sides_px: sizes S that the encoders take.
        folder: of the pixel files.
        fit: a name of `FITS`.
        on_progress: called with images done and images in all.

    Returns:
        The data, and row, reason code and message of each image left out.

    Raises:
        InputError: no image of a class can be read.
    """
    sides = sorted(set(sides_px))
    pixels: dict[int, Path] = {}
    bad: dict[int, Bad] = {}
    for place, side in enumerate(sides):

        def progress(done: int, total: int, place: int = place) -> None:
            if on_progress is not None:
                on_progress(place * total + done, len(sides) * total)

        made = cached_pixels(cells.paths, side, folder, fit=fit, on_progress=progress)
        pixels[side] = made.path
        bad |= {fault[0]: fault for fault in made.bad}
    rows = np.setdiff1d(np.arange(len(cells)), np.array(sorted(bad), dtype=np.int64))
    data = CellData(cells=cells.without(sorted(bad)), rows=rows, pixels=pixels)
    return data, [bad[row] for row in sorted(bad)]


def split_counts(cells: Any, split: Split) -> list[dict[str, Any]]:
    """Examples and groups of every class in every part: rows for a table.

    Args:
        cells: has `labels`, `groups` and `classes`.
        split: the parts.
    """
    rows = []
    for index, name in enumerate(cells.classes):
        row: dict[str, Any] = {"class": name}
        for part, members in split._asdict().items():
            chosen = members[cells.labels[members] == index]
            row[part] = len(chosen)
            row[f"{part} groups"] = len(set(cells.groups[chosen].tolist()))
        rows.append(row)
    return rows


def check_shots(cells: Any, split: Split, most: int) -> None:
    """See that every class has as many training examples as the largest number of shots.

    Args:
        cells: has `labels` and `classes`.
        split: the parts.
        most: shots.

    Raises:
        InputError: names every class that has too few.
    """
    counts = np.bincount(cells.labels[split.train], minlength=len(cells.classes))
    problems = [
        f"class {name!r} has {count} training examples, {most} shots are asked for"
        for name, count in zip(cells.classes, counts.tolist(), strict=True)
        if count < most
    ]
    raise_problems("the training part is too small; ask for fewer --shots:", problems)
