"""What every slide reader is and says, and the checks before opening."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass

import cv2
import numpy as np

from cytoray.errors import SlideError

# Outside these bounds a resolution tag is a printing density (72 dpi is 353 um/px), not optics.
MIN_PLAUSIBLE_MPP = 0.01
MAX_PLAUSIBLE_MPP = 30.0
# Source pixels held at once while a large area is reduced; 16 Mpx are 48 MB of RGB.
BLOCK_PX = 4096


@dataclass(frozen=True, kw_only=True)
class SlideInfo:
    """Geometry and provenance of one opened slide; plain values, so it travels between processes.

    Attributes:
        width_px_level0, height_px_level0: size of the finest level.
        level_dimensions: (width, height) of every level in its own pixels, finest first.
        level_downsamples: level-0 pixels per pixel of each level (whole numbers where the level's
            size is the rounded-down or rounded-up quotient, so that positions do not drift).
        mpp_x, mpp_y: um per level-0 pixel as the file states it; None when absent or implausible.
        objective_power: e.g. 20.0 or 40.0; None when absent.
        vendor: the container, e.g. `aperio`, `generic-tiff`, `image`.
        reader: which reader of the ladder serves the pixels: `tiff`, `openslide`, `ome` or
            `image`.
        reader_reason: why that reader, in a sentence.
    """

    width_px_level0: int
    height_px_level0: int
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    mpp_x: float | None
    mpp_y: float | None
    objective_power: float | None
    vendor: str
    reader: str
    reader_reason: str

    @property
    def num_levels(self) -> int:
        return len(self.level_dimensions)


class SlideReader(ABC):
    """An open slide. A handle belongs to the process that opened it and is never pickled.

    Only pyramid levels can be read: label and macro photographs and the patient fields of the
    container are out of reach by construction.
    """

    info: SlideInfo

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self):
        raise TypeError("a slide reader is not picklable; send the path and open it there")

    @abstractmethod
    def close(self) -> None:
        """Release the file; reading afterwards is an error."""

    def limit_cache(self, cache_bytes: int) -> None:  # noqa: B027 - not every reader has one
        """Keep at most so many bytes of decoded pixels; a reader that keeps none ignores it."""

    @abstractmethod
    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Read a rectangle that lies inside the level."""

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Read a rectangle of one level.

        Args:
            level: 0 is the finest.
            x, y: top-left corner in that level's pixels.
            width, height: size in that level's pixels; the rectangle must lie inside the level.

        Returns:
            uint8 (height, width, 3) RGB. Parts the scanner did not image are white.

        Raises:
            ValueError: the rectangle leaves the level.
            SlideError: `decode_error` when any pixel of the rectangle cannot be decoded.
        """
        level_width, level_height = self.info.level_dimensions[level]
        inside = x >= 0 and y >= 0 and x + width <= level_width and y + height <= level_height
        if width < 1 or height < 1 or not inside:
            raise ValueError(
                f"rectangle {x},{y} {width}x{height} is not inside level {level} "
                f"({level_width}x{level_height} px)"
            )
        return self._read(level, x, y, width, height)

    def read_reduced(
        self, level: int, x: int, y: int, width: int, height: int, factor: int
    ) -> np.ndarray:
        """Read a rectangle of a level averaged over factor×factor pixels, in bounded memory.

        Returns:
            uint8 (height // factor, width // factor, 3); what is left over at the right and the
            bottom is dropped.
        """
        if factor == 1:
            return self.read_level(level, x, y, width, height)
        out = np.empty((height // factor, width // factor, 3), np.uint8)
        step = max(1, BLOCK_PX // factor)
        for top in range(0, out.shape[0], step):
            for left in range(0, out.shape[1], step):
                rows = min(step, out.shape[0] - top)
                columns = min(step, out.shape[1] - left)
                block = self.read_level(
                    level, x + left * factor, y + top * factor, columns * factor, rows * factor
                )
                out[top : top + rows, left : left + columns] = cv2.resize(
                    block, (columns, rows), interpolation=cv2.INTER_AREA
                )
        return out

    def thumbnail(self, max_px: int) -> np.ndarray:
        """A small picture of the whole slide, made from pyramid levels only.

        Args:
            max_px: longest side of the result.

        Returns:
            uint8 (h, w, 3) RGB with the slide's proportions and max(h, w) <= max_px.
        """
        fitting = [i for i, size in enumerate(self.info.level_dimensions) if max(size) >= max_px]
        level = fitting[-1] if fitting else 0
        width, height = self.info.level_dimensions[level]
        shrink = max(1.0, max(width, height) / max_px)
        factor = max(1, min(int(shrink), width, height))
        reduced = self.read_reduced(level, 0, 0, width, height, factor)
        size = (max(1, round(width / shrink)), max(1, round(height / shrink)))
        if size == (reduced.shape[1], reduced.shape[0]):
            return reduced
        return cv2.resize(reduced, size, interpolation=cv2.INTER_AREA)


def check_file(path: str) -> int:
    """Return the size of `path` in bytes, or say at once why it cannot be a slide.

    Raises:
        SlideError: `missing_file`, `empty_file`, `unreadable_file`, or `truncated` for a TIFF
            whose first directory lies behind the end of the file.
    """
    if os.path.isdir(path):
        raise SlideError("not_a_slide", f"{path} is a folder, not a slide file")
    if not os.path.isfile(path):
        raise SlideError("missing_file", f"no file at {path}; check the manifest's path column")
    size_bytes = os.path.getsize(path)
    if size_bytes == 0:
        raise SlideError("empty_file", f"{path} has zero bytes; copy it again")
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise SlideError("unreadable_file", f"{path} cannot be read: {error}") from error
    offset = _first_tiff_directory(head)
    if offset is not None and offset + 2 > size_bytes:
        raise SlideError(
            "truncated",
            f"{path} ends at byte {size_bytes}, before its directory at {offset}; copy it again",
        )
    return size_bytes


def _first_tiff_directory(head: bytes) -> int | None:
    """Byte offset of the first directory of a (Big)TIFF, None for another kind of file."""
    order = {b"II": "little", b"MM": "big"}.get(head[:2])
    if order is None or len(head) < 16:
        return None
    byteorder = "little" if order == "little" else "big"
    version = int.from_bytes(head[2:4], byteorder)
    if version == 42:
        return int.from_bytes(head[4:8], byteorder)
    if version == 43:
        return int.from_bytes(head[8:16], byteorder)
    return None


def plausible_mpp(value: object) -> float | None:
    """The number in `value` if it can be a microscope's um/px, else None."""
    try:
        mpp = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return None
    return mpp if math.isfinite(mpp) and MIN_PLAUSIBLE_MPP < mpp < MAX_PLAUSIBLE_MPP else None


def level_downsamples(dimensions: tuple[tuple[int, int], ...]) -> tuple[float, ...]:
    """Level-0 pixels per pixel of each level, from the sizes alone.

    A level made by halving an odd size loses a remainder; taking the plain quotient would shift
    the far edge by a pixel, so a whole number is used wherever it explains both sides.
    """
    width, height = dimensions[0]
    result = []
    for level_width, level_height in dimensions:
        quotient = (width / level_width + height / level_height) / 2
        whole = round(quotient)
        explains = (
            whole >= 1
            and abs(width / whole - level_width) <= 1
            and abs(height / whole - level_height) <= 1
        )
        result.append(float(whole) if explains else quotient)
    return tuple(result)
