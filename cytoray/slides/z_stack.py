"""Slides scanned at several focal depths: of every chunk the sharpest plane is read.

The planes are separate files of one slide, or the Z axis of one OME-TIFF. What is read hangs on
the pixels of the chunk alone, so that every job takes the same plane.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tifffile

from cytoray.errors import SlideError
from cytoray.slides.focus import tile_focus
from cytoray.slides.reader import open_slide
from cytoray.slides.readers_base import SlideInfo, SlideReader, check_file
from cytoray.slides.readers_image import MAX_IMAGE_PX
from cytoray.slides.readers_ome import open_ome_planes

# Decoded pixels that all planes of a slide may keep together.
STACK_CACHE_BYTES = 96 << 20
MPP_TOLERANCE = 1e-3
NDPI_FOCAL_PLANE = 65424
NDPI_MAGNIFICATION = 65421


class StackReader(SlideReader):
    """An open slide of several focal planes of the same geometry.

    Read as a slide (for the overview and the thumbnail) it shows the middle plane, and where that
    cannot be decoded its neighbours.

    Args:
        planes: open readers in the order of their depth; closed together with this one.
        middle: index of the plane that stands for the slide.

    Raises:
        SlideError: `z_mismatch` when the planes differ in size, levels or um/px.
    """

    def __init__(self, planes: Sequence[SlideReader], middle: int) -> None:
        self.planes = tuple(planes)
        self.middle = middle
        info = self.planes[middle].info
        for index, plane in enumerate(self.planes):
            _check_same(info, plane.info, index)
        reason = f"{len(self.planes)} focal planes; {info.reader_reason}"
        self.info = replace(info, reader_reason=reason)

    def close(self) -> None:
        for plane in self.planes:
            plane.close()

    def limit_cache(self, cache_bytes: int) -> None:
        for plane in self.planes:
            plane.limit_cache(cache_bytes // len(self.planes))

    def order(self, first: int) -> list[int]:
        """All planes by their distance from `first`, of two equal ones the more central first."""
        return sorted(
            range(len(self.planes)), key=lambda i: (abs(i - first), abs(i - self.middle), i)
        )

    def from_plane(self, z_index: int) -> SlideReader:
        """The slide with another plane in front; it shares the open files, which this one closes.

        Raises:
            IndexError: no such plane.
        """
        return _PlaneFirst(self, z_index)

    def sharpest(self, read: Callable[[SlideReader], np.ndarray], mpp: float) -> int:
        """Index of the sharpest plane in a region, see `tile_focus`.

        Args:
            read: pixels uint8 (h, w, 3) of the region in one plane, or a SlideError.
            mpp: um per pixel of what it returns.

        Returns:
            Of equally sharp planes, and where there is too little structure to tell, the one
            nearest to the middle that can be decoded; the middle when none can.
        """
        best: int | None = None
        best_score = -np.inf
        for index in self.order(self.middle):
            try:
                score = tile_focus(read(self.planes[index]), mpp)
            except SlideError:
                continue
            if best is None or score > best_score:
                best, best_score = index, (-np.inf if np.isnan(score) else score)
        return self.middle if best is None else best

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        return self.read_from(self.middle, level, x, y, width, height)

    def read_from(
        self, first: int, level: int, x: int, y: int, width: int, height: int
    ) -> np.ndarray:
        """Read a rectangle of a level from plane `first`, or from the nearest that can be decoded.

        Raises:
            SlideError: `decode_error` when none of the planes can.
        """
        problem = SlideError("decode_error", "no focal plane could be read")
        for place, index in enumerate(self.order(first)):
            try:
                return self.planes[index].read_level(level, x, y, width, height)
            except SlideError as error:
                if place == 0:
                    problem = error
        raise SlideError(
            problem.code, f"in every focal plane: {problem.message}", problem.region
        ) from problem


class _PlaneFirst(SlideReader):
    """A stack seen from one of its planes."""

    def __init__(self, stack: StackReader, z_index: int) -> None:
        self._stack = stack
        self._first = z_index
        self.info = stack.planes[z_index].info

    def close(self) -> None:
        """The stack closes its files."""

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        return self._stack.read_from(self._first, level, x, y, width, height)


def open_row(row: Mapping[str, Any], *, reader: str = "auto", verify: bool = True) -> SlideReader:
    """Open the slide of a row of the manifest or of the slide table.

    Args:
        row: `path`, and `z_paths` where the slide has several files: their paths ordered by
            depth, `path` among them, which is the plane that stands for the slide.
        reader: see `open_slide`; also `ome` for the planes of an OME-TIFF.
        verify: see `open_slide`.

    Raises:
        SlideError: see `open_stack`.
    """
    paths = row.get("z_paths") or [row["path"]]
    middle = paths.index(row["path"]) if row["path"] in paths else None
    return open_stack(paths, middle=middle, reader=reader, verify=verify)


def open_stack(
    paths: Sequence[str], *, middle: int | None = None, reader: str = "auto", verify: bool = True
) -> SlideReader:
    """Open a slide of one or several focal planes.

    Args:
        paths: one file a plane, ordered by depth; or a single file, whose own planes are found.
        middle: which of several files stands for the slide; default: the one in the middle.
        reader: see `open_slide`; also `ome` for the planes of an OME-TIFF.
        verify: see `open_slide`.

    Returns:
        A `StackReader`; for one file without planes the reader of `open_slide`.

    Raises:
        SlideError: as `open_slide`, and `z_mismatch` when the planes differ in geometry.
    """
    if len(paths) == 1:
        slide = _open_one(paths[0], reader, verify)
    else:
        middle = len(paths) // 2 if middle is None else middle
        slide = _stack(_open_planes(paths, reader, verify), middle)
    if isinstance(slide, StackReader):
        slide.limit_cache(STACK_CACHE_BYTES)
    return slide


def _open_one(path: str, reader: str, verify: bool) -> SlideReader:
    """One file: its own focal planes if they can be read, else the slide with a word about them."""
    problem = ""
    is_tiff = path.lower().endswith((".tif", ".tiff")) and os.path.isfile(path)
    if reader in ("auto", "ome") and is_tiff:
        check_file(path)
        planes, problem = open_ome_planes(path)
        if planes:
            return _stack(planes, len(planes) // 2)
    if reader == "ome":
        reason = problem or "it is no OME-TIFF with several focal planes"
        raise SlideError("reader_unfit", f"the planes of {path} cannot be served: {reason}")
    slide = open_slide(path, reader=reader, verify=verify)
    problem = problem or hidden_planes(path, slide.info.vendor)
    if problem:
        reason = f"{slide.info.reader_reason}; {problem}"
        slide.info = replace(slide.info, reader_reason=reason)
    return slide


def hidden_planes(path: str, vendor: str) -> str:
    """What to say of focal planes that OpenSlide does not show; empty when there are none."""
    if vendor == "dicom":
        return "were there several focal planes, OpenSlide would show one only"
    if vendor != "hamamatsu" or not path.lower().endswith(".ndpi") or not os.path.isfile(path):
        return ""
    count = count_ndpi_planes(path)
    return f"one of {count} focal planes: OpenSlide shows no others" if count > 1 else ""


def count_ndpi_planes(path: str) -> int:
    """Focal planes of a Hamamatsu NDPI; 0 when its directories cannot be read."""
    try:
        with tifffile.TiffFile(path) as tiff:
            depths = set()
            for page in tiff.pages:
                tags = page.aspage().tags
                if float(tags.valueof(NDPI_MAGNIFICATION, default=0)) > 0:  # no macro, no map
                    depths.add(tags.valueof(NDPI_FOCAL_PLANE, default=0))
    except (tifffile.TiffFileError, OSError, ValueError, TypeError, KeyError):
        return 0
    return len(depths)


def _open_planes(paths: Sequence[str], reader: str, verify: bool) -> list[SlideReader]:
    """Open every file with the same reader: where the ladder chose several, with the slowest."""
    planes: list[SlideReader] = []
    try:
        for path in paths:
            planes.append(open_slide(path, reader=reader, verify=verify))
        names = {plane.info.reader for plane in planes}
        if names == {"tiff", "openslide"}:
            reasons = [p.info.reader_reason for p in planes if p.info.reader == "openslide"]
            _close(planes)
            planes = []
            for path in paths:
                planes.append(open_slide(path, reader="openslide", verify=verify))
            planes = [_with_reason(plane, reasons[0]) for plane in planes]
    except BaseException:
        _close(planes)
        raise
    return planes


def _with_reason(plane: SlideReader, reason: str) -> SlideReader:
    plane.info = replace(plane.info, reader_reason=reason)
    return plane


def _stack(planes: Sequence[SlideReader], middle: int) -> StackReader:
    try:
        stack = StackReader(planes, middle)
        area = stack.info.width_px_level0 * stack.info.height_px_level0 * len(planes)
        if stack.info.reader == "image" and area > MAX_IMAGE_PX:
            raise SlideError(
                "image_too_large",
                f"{len(planes)} planes of {stack.info.width_px_level0}x"
                f"{stack.info.height_px_level0} px in one piece; convert them to tiled TIFFs",
            )
    except SlideError:
        _close(planes)
        raise
    return stack


def _close(planes: Sequence[SlideReader]) -> None:
    for plane in planes:
        plane.close()


def _check_same(info: SlideInfo, other: SlideInfo, index: int) -> None:
    """Refuse a plane whose pixels are not at the same places as the middle one's."""
    differs = ""
    if other.level_dimensions != info.level_dimensions:
        differs = f"levels of {_sizes(other)} px, the middle one {_sizes(info)}"
    elif other.reader != info.reader:
        differs = f"the reader {other.reader}, the middle one {info.reader}"
    elif not _close_mpp(info.mpp_x, other.mpp_x) or not _close_mpp(info.mpp_y, other.mpp_y):
        differs = f"{other.mpp_x} um/px, the middle one {info.mpp_x}"
    if differs:
        raise SlideError(
            "z_mismatch",
            f"focal plane {index + 1} has {differs}; all planes of a slide must have the same",
        )


def _sizes(info: SlideInfo) -> str:
    return ", ".join(f"{width}x{height}" for width, height in info.level_dimensions)


def _close_mpp(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= MPP_TOLERANCE * one
