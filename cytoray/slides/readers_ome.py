"""The focal planes of one OME-TIFF, each a slide by itself; OpenSlide would show the first only."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile

from cytoray.errors import SlideError
from cytoray.slides.jpeg_tiles import tile_decoder
from cytoray.slides.readers_base import SlideInfo, SlideReader, level_downsamples, plausible_mpp

JPEG, YCBCR = 7, 6
UM_PER_OME_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}

# decode(stream, index) -> uint8 (h, w, 3), or raises whatever the codec raises.
SegmentDecoder = Callable[[bytes, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class OmeLevel:
    """The tiles (or strips) of one level of one plane, row-major."""

    width: int
    height: int
    tile_width: int
    tile_height: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    decode: SegmentDecoder


class OmePlaneReader(SlideReader):
    """One focal plane of an OME-TIFF.

    Args:
        path: a local file.
        levels: where its pixels lie, finest first.
        info: what is said of every plane of the file.
    """

    def __init__(self, path: str, levels: tuple[OmeLevel, ...], info: SlideInfo) -> None:
        self.info = info
        self._levels = levels
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cache_bytes = 32 << 20
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._size_bytes = os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()
        self._cache.clear()

    def limit_cache(self, cache_bytes: int) -> None:
        self._cache_bytes = cache_bytes

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        layout = self._levels[level]
        tw, th = layout.tile_width, layout.tile_height
        out = np.empty((height, width, 3), np.uint8)
        for row in range(y // th, (y + height - 1) // th + 1):
            for column in range(x // tw, (x + width - 1) // tw + 1):
                tile = self._tile(level, row, column)
                left, top = column * tw, row * th
                x0, x1 = max(left, x), min(left + tw, x + width)
                y0, y1 = max(top, y), min(top + th, y + height)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[
                    y0 - top : y1 - top, x0 - left : x1 - left
                ]
        return out

    def _tile(self, level: int, row: int, column: int) -> np.ndarray:
        layout = self._levels[level]
        index = row * -(-layout.width // layout.tile_width) + column
        key = (level, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        region = f"level {level} tile column {column} row {row}"
        offset, size = layout.offsets[index], layout.sizes[index]
        if offset + size > self._size_bytes:
            raise SlideError(
                "decode_error", "the file ends before this tile (truncated), " + region, region
            )
        self._file.seek(offset)
        try:
            tile = layout.decode(self._file.read(size), index)
        except SlideError as error:
            raise SlideError(error.code, f"{error.message}, {region}", region) from error
        except Exception as error:  # every codec has its own
            raise SlideError("decode_error", f"OME-TIFF tile: {error}, {region}", region) from error
        self._cache[key] = tile
        while sum(t.nbytes for t in self._cache.values()) > self._cache_bytes:
            self._cache.popitem(last=False)
        return tile


def open_ome_planes(path: str) -> tuple[list[OmePlaneReader], str]:
    """The focal planes of an OME-TIFF with a Z axis.

    Args:
        path: a local file.

    Returns:
        One reader a plane, in the file's order; or none, with the reason why its planes cannot be
        read (empty when there are none: no OME-TIFF, or a single plane).
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            if not tiff.is_ome:
                return [], ""
            series = tiff.series[0]
            if "Z" not in series.axes or series.shape[series.axes.index("Z")] < 2:
                return [], ""
            problem = _unfit(series)
            if problem:
                return [], f"its focal planes cannot be read: {problem}"
            layouts = [
                tuple(_level(level.pages[plane]) for level in series.levels)
                for plane in range(series.shape[0])
            ]
            info = _info(tiff, layouts[0])
    except (tifffile.TiffFileError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        return [], f"its directories cannot be read as OME-TIFF: {error}"
    return [OmePlaneReader(path, levels, info) for levels in layouts], ""


def _unfit(series: tifffile.TiffPageSeries) -> str:
    """Why a series with a Z axis is none that is served; empty when it is."""
    for level in series.levels:
        if level.axes != "ZYXS" or level.shape[0] != series.shape[0]:
            return f"axes {level.axes}, not ZYXS"
        if level.dtype != np.uint8 or level.shape[3] != 3:
            return f"{level.shape[3]} channels of {level.dtype}, not 8-bit RGB"
        if any(page is None for page in level.pages):
            return "planes lie in other files"
        if not all((np.asarray(page.databytecounts) > 0).all() for page in level.pages if page):
            return "tiles are missing"
    return ""


def _level(page: Any) -> OmeLevel:
    frame = page.keyframe  # what all planes of a level have in common
    tiled = frame.is_tiled
    decode = _jpeg_decoder(frame, page) if frame.compression == JPEG and tiled else _decoder(frame)
    return OmeLevel(
        width=frame.imagewidth,
        height=frame.imagelength,
        tile_width=frame.tilewidth if tiled else frame.imagewidth,
        tile_height=frame.tilelength if tiled else frame.rowsperstrip,
        offsets=tuple(page.dataoffsets),
        sizes=tuple(page.databytecounts),
        decode=decode,
    )


def _jpeg_decoder(frame: Any, page: Any) -> SegmentDecoder:
    """Strict decoding: damage is an error here, where libjpeg would only warn."""
    decode = tile_decoder()
    tables, is_ycbcr = bytes(page.jpegtables or b""), int(frame.photometric) == YCBCR
    shape = (frame.tilelength, frame.tilewidth, 3)

    def decode_tile(stream: bytes, index: int) -> np.ndarray:
        tile = np.empty(shape, np.uint8)
        decode(stream, tables, is_ycbcr, tile)
        return tile

    return decode_tile


def _decoder(frame: Any) -> SegmentDecoder:
    decode = frame.decode
    tables = frame.jpegtables

    def decode_segment(stream: bytes, index: int) -> np.ndarray:
        data = decode(stream, index, jpegtables=tables)[0]
        return np.ascontiguousarray(data[0])

    return decode_segment


def _info(tiff: tifffile.TiffFile, levels: tuple[OmeLevel, ...]) -> SlideInfo:
    dimensions = tuple((level.width, level.height) for level in levels)
    mpp_x, mpp_y = ome_mpp(tiff.ome_metadata or "")
    return SlideInfo(
        width_px_level0=dimensions[0][0],
        height_px_level0=dimensions[0][1],
        level_dimensions=dimensions,
        level_downsamples=level_downsamples(dimensions),
        mpp_x=mpp_x,
        mpp_y=mpp_y,
        objective_power=None,
        vendor="ome-tiff",
        reader="ome",
        reader_reason="an OME-TIFF with a Z axis, which OpenSlide does not show",
    )


def ome_mpp(xml: str) -> tuple[float | None, float | None]:
    """um per pixel (x, y) of the first image in OME-XML; (None, None) without a length."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None, None
    pixels = next((e for e in root.iter() if e.tag.rsplit("}", 1)[-1] == "Pixels"), None)
    if pixels is None:
        return None, None
    found = []
    for axis in "XY":
        unit = UM_PER_OME_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), 0.0)
        try:
            found.append(plausible_mpp(float(pixels.get(f"PhysicalSize{axis}", "")) * unit))
        except ValueError:
            found.append(None)
    return (found[0], found[1]) if None not in found else (None, None)
