"""The fast reader: tiled JPEG TIFF (Aperio SVS, generic TIFF), each tile decoded once.

OpenSlide spends four times the JPEG decoding time on composing a region; here tiles are decoded
straight into place. The pixels are the same: `verify_against` compares them at opening.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import tifffile

from cytoray.errors import SlideError
from cytoray.slides.jpeg_tiles import RESTART_INTERVAL, START_OF_SCAN, tile_decoder
from cytoray.slides.readers_base import SlideInfo, SlideReader

DEFAULT_CACHE_BYTES = 64 << 20
JPEG, RGB, YCBCR = 7, 2, 6


class NotNativeError(Exception):
    """This file's layout is not one the fast reader serves; the text says why."""


@dataclass(frozen=True, kw_only=True)
class TiledLevel:
    """Where the tiles of one level lie in the file: row-major, `columns` tiles a row."""

    width: int
    height: int
    tile_width: int
    tile_height: int
    columns: int
    offsets: np.ndarray
    sizes: np.ndarray
    tables: bytes
    is_ycbcr: bool


class TiffReader(SlideReader):
    """Pixels of a regular grid of JPEG tiles, decoded by libjpeg-turbo without composing.

    Args:
        path: a local TIFF.
        info: what OpenSlide says of the same file; its levels are the ones served.
        cache_bytes: decoded tiles kept, so that the halo of a neighbouring chunk costs nothing.
        decoder: a name of `jpeg_tiles.TILE_DECODERS`, or `auto`.

    Raises:
        NotNativeError: the layout is another one; use OpenSlide.
    """

    def __init__(
        self,
        path: str,
        info: SlideInfo,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        decoder: str = "auto",
    ) -> None:
        self.levels = read_layout(path, info.level_dimensions)
        self.info = replace(
            info, reader="tiff", reader_reason="tiled JPEG; pixels compared with OpenSlide's"
        )
        self._decode = tile_decoder(decoder)
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._scratch: np.ndarray | None = None
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._size_bytes = os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()
        self.clear_cache()

    def limit_cache(self, cache_bytes: int) -> None:
        self._cache_bytes = cache_bytes

    def clear_cache(self) -> None:
        """Forget all decoded tiles."""
        self._cache.clear()
        self._cached_bytes = 0

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        layout = self.levels[level]
        tw, th = layout.tile_width, layout.tile_height
        out = np.empty((height, width, 3), np.uint8)
        columns_again = _needed_again(x, width, tw, layout.width)
        rows_again = _needed_again(y, height, th, layout.height)
        for row in range(y // th, (y + height - 1) // th + 1):
            for column in range(x // tw, (x + width - 1) // tw + 1):
                keep = row in rows_again or column in columns_again
                tile = self._tile(level, row * layout.columns + column, keep)
                left, top = column * tw, row * th
                x0, x1 = max(left, x), min(left + tw, x + width)
                y0, y1 = max(top, y), min(top + th, y + height)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[
                    y0 - top : y1 - top, x0 - left : x1 - left
                ]
        return out

    def _tile(self, level: int, index: int, keep: bool) -> np.ndarray:
        """One decoded tile, uint8 (tile_height, tile_width, 3), valid until the next call.

        A tile to `keep` goes into the cache; the others share one buffer, so that the bulk of a
        chunk is decoded without touching new memory.
        """
        key = (level, index)
        cached = self._cache.get(key)
        if cached is not None:
            self._cache.move_to_end(key)
            return cached
        layout = self.levels[level]
        shape = (layout.tile_height, layout.tile_width, 3)
        tile, self._scratch = self._scratch, None
        if tile is None or tile.shape != shape:
            tile = np.empty(shape, np.uint8)
        try:
            self._decode(self.tile_stream(level, index), layout.tables, layout.is_ycbcr, tile)
        except SlideError as error:
            row, column = divmod(index, layout.columns)
            region = f"level {level} tile column {column} row {row}"
            raise SlideError(error.code, f"{error.message}, {region}", region) from error
        if keep:
            self._keep(key, tile)
        else:
            self._scratch = tile
        return tile

    def _keep(self, key: tuple[int, int], tile: np.ndarray) -> None:
        """Put a tile into the cache; what falls out becomes the next buffer."""
        self._cache[key] = tile
        self._cached_bytes += tile.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, self._scratch = self._cache.popitem(last=False)
            self._cached_bytes -= self._scratch.nbytes

    def tile_stream(self, level: int, index: int) -> bytes:
        """The JPEG stream of one tile as it lies in the file, without the shared tables."""
        layout = self.levels[level]
        offset, size = int(layout.offsets[index]), int(layout.sizes[index])
        if offset + size > self._size_bytes:
            raise SlideError("decode_error", "the file ends before this tile (truncated)")
        self._file.seek(offset)
        return self._file.read(size)


def _needed_again(start: int, length: int, side: int, limit: int) -> set[int]:
    """Tile columns (or rows) that a neighbouring region will want too.

    Where a region's border cuts through a tile, that tile and, for a neighbour with a halo, the
    one further in. A border between tiles, or at the level's own border, has no such tiles.
    """
    again: set[int] = set()
    end = start + length
    if start % side:
        again |= {start // side, start // side + 1}
    if end % side and end < limit:
        again |= {end // side, end // side - 1}
    return again


def read_layout(path: str, level_dimensions: tuple[tuple[int, int], ...]) -> tuple[TiledLevel, ...]:
    """Find the directory of each level in a TIFF.

    Raises:
        NotNativeError: not a TIFF, a level is not a full grid of 8-bit RGB JPEG tiles, or tiles
            are missing (OpenSlide fills those in its own way).
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [p for p in tiff.pages if isinstance(p, tifffile.TiffPage) and p.is_tiled]
            by_size: dict[tuple[int, int], tifffile.TiffPage] = {}
            for page in pages:
                by_size.setdefault((page.imagewidth, page.imagelength), page)
            levels = []
            for number, size in enumerate(level_dimensions):
                if size not in by_size:
                    raise NotNativeError(f"level {number} is not one directory of tiles")
                levels.append(_level(by_size[size], number))
            _refuse_restarts(tiff, levels[0])
    except NotNativeError:
        raise
    except Exception as error:  # a damaged directory fails in any way at all
        raise NotNativeError(f"not a plain TIFF: {error}") from error
    return tuple(levels)


def _level(page: tifffile.TiffPage, number: int) -> TiledLevel:
    where = f"level {number}"
    if int(page.compression) != JPEG:
        raise NotNativeError(
            f"{where} is compressed with {tifffile.COMPRESSION(page.compression).name}, not JPEG"
        )
    if int(page.photometric) not in (RGB, YCBCR) or page.samplesperpixel != 3:
        raise NotNativeError(f"{where} is not three-channel colour")
    if page.bitspersample != 8 or int(page.planarconfig) != 1 or page.imagedepth != 1:
        raise NotNativeError(f"{where} is not 8-bit interleaved")
    columns = -(-page.imagewidth // page.tilewidth)
    rows = -(-page.imagelength // page.tilelength)
    offsets = np.asarray(page.dataoffsets, np.int64)
    sizes = np.asarray(page.databytecounts, np.int64)
    if len(offsets) != rows * columns or len(sizes) != len(offsets):
        raise NotNativeError(f"{where} has {len(offsets)} tiles, not {rows * columns}")
    if (sizes == 0).any() or (offsets == 0).any():
        raise NotNativeError(f"{where} has missing tiles")
    return TiledLevel(
        width=page.imagewidth,
        height=page.imagelength,
        tile_width=page.tilewidth,
        tile_height=page.tilelength,
        columns=columns,
        offsets=offsets,
        sizes=sizes,
        tables=bytes(page.jpegtables or b""),
        is_ycbcr=int(page.photometric) == YCBCR,
    )


def _refuse_restarts(tiff: tifffile.TiffFile, level: TiledLevel) -> None:
    """Restart intervals let libjpeg skip damage silently; OpenSlide's strictness is wanted then."""
    tiff.filehandle.seek(int(level.offsets[0]))
    head = tiff.filehandle.read(min(int(level.sizes[0]), 4096))
    if RESTART_INTERVAL in head[: head.find(START_OF_SCAN)]:
        raise NotNativeError("its JPEG tiles have restart intervals")


def verify_against(reader: SlideReader, reference: SlideReader) -> str:
    """Compare a reader with OpenSlide, pixel for pixel, on a few small regions of each level.

    Returns:
        An empty string when all pixels agree, else what differs, in a sentence.
    """
    compared = 0
    for level in range(reader.info.num_levels):
        for region in _probes(reader.info, level):
            pixels = _try_read(reader, level, region)
            expected = _try_read(reference, level, region)
            if pixels is None and expected is None:
                continue
            if pixels is None or expected is None:
                which = "the fast decoder" if pixels is None else "OpenSlide"
                return f"only {which} refuses level {level} at {region}"
            if not np.array_equal(pixels, expected):
                return f"pixels differ from OpenSlide's on level {level} at {region}"
            compared += 1
    return "" if compared else "no probe region could be read"


def _probes(info: SlideInfo, level: int) -> list[tuple[int, int, int, int]]:
    """Regions (x, y, width, height): a corner, an unaligned middle, and the far corner.

    Where the downsample is not whole, OpenSlide interpolates everywhere but at the origin.
    """
    width, height = info.level_dimensions[level]
    w, h = min(width, 300), min(height, 300)
    if not info.level_downsamples[level].is_integer():
        return [(0, 0, w, h)]
    quotient = info.width_px_level0 / width
    if abs(quotient - round(quotient)) > 1e-9 or info.height_px_level0 % height:
        return [(0, 0, w, h)]
    side_w, side_h = min(width, 130), min(height, 130)
    left, top = min(max(0, width // 2 - 77), width - side_w), height // 2 - 51
    middle = (left, min(max(0, top), height - side_h), side_w, side_h)
    far = (width - side_w, height - side_h, side_w, side_h)
    return [(0, 0, side_w, side_h), middle, far]


def _try_read(
    reader: SlideReader, level: int, region: tuple[int, int, int, int]
) -> np.ndarray | None:
    try:
        return reader.read_level(level, *region)
    except SlideError:
        return None
