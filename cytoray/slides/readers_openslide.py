"""The reference reader: OpenSlide, for every scanner format it knows."""

from __future__ import annotations

import ctypes
import re

import cv2
import numpy as np
import openslide

from cytoray.errors import SlideError
from cytoray.slides.readers_base import SlideInfo, SlideReader, level_downsamples, plausible_mpp

MIN_CACHE_BYTES = 32 << 20
MAX_CACHE_BYTES = 256 << 20
_BAND_PX = 1 << 19  # 2 MB as RGBA
# What an error quotes from the file (a line of its index, a property), and unique identifiers.
_FROM_FILE = re.compile(
    r"(?<!\w)[\"'\u201c\u2018`].*[\"'\u201d\u2019`]|\d+(?:\.\d+){4,}", re.DOTALL
)


class OpenSlideReader(SlideReader):
    """Pixels through OpenSlide.

    OpenSlide refuses a handle for good after one failed read, so the handle is opened anew after
    an error and the other regions of the slide stay readable.

    Args:
        path: a local file.
        reason: why this reader was chosen, kept in `info.reader_reason`.

    Raises:
        SlideError: `not_a_slide` when no OpenSlide driver knows the file, `decode_error` when one
            does but cannot open it.
    """

    def __init__(self, path: str, reason: str = "OpenSlide was asked for") -> None:
        self._path = path
        self._slide = _open(path)
        self._downsamples = self._slide.level_downsamples
        self.info = _read_info(self._slide, reason)
        self._background_rgb = _background(self._slide)
        self._cache_bytes = self._row_bytes()
        self._set_cache()

    def _row_bytes(self) -> int:
        """Room for a row of the finest level's tiles and half a row more, as RGBA."""
        tile_height = int(self._slide.properties.get("openslide.level[0].tile-height", 256))
        row = self.info.width_px_level0 * tile_height * 4
        return min(MAX_CACHE_BYTES, max(MIN_CACHE_BYTES, row * 3 // 2))

    def _set_cache(self) -> None:
        self._slide.set_cache(openslide.OpenSlideCache(self._cache_bytes))

    def limit_cache(self, cache_bytes: int) -> None:
        self._cache_bytes = min(self._cache_bytes, cache_bytes)
        self._set_cache()

    def close(self) -> None:
        self._slide.close()

    def _reopen(self) -> None:
        self._slide.close()
        self._slide = _open(self._path)
        self._set_cache()

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        # A band at a time stays in the processor's cache while it is converted. Where level and
        # level 0 have no common pixel grid, bands would be rounded apart from one another.
        rows = max(1, _BAND_PX // width) if self._downsamples[level].is_integer() else height
        region = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, rows):
            band = region[top : top + rows]
            band[:] = self._read_band(level, x, y + top, width, len(band))
        return region

    def _read_band(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        # OpenSlide takes the corner in level-0 pixels and divides by its own downsample.
        downsample = self._downsamples[level]
        corner = (round(x * downsample), round(y * downsample))
        try:
            rgba = np.asarray(self._slide.read_region(corner, level, (width, height)))
        except (openslide.OpenSlideError, ctypes.ArgumentError) as error:
            region = f"level {level} x {x} y {y} {width}x{height}"
            self._reopen()
            raise SlideError("decode_error", f"OpenSlide: {_reason(error)}", region) from error
        return flatten_alpha(rgba, self._background_rgb)


def flatten_alpha(rgba: np.ndarray, background_rgb: tuple[int, int, int]) -> np.ndarray:
    """Lay an image with straight alpha on a background: uint8 (h, w, 4) to uint8 (h, w, 3).

    Transparent pixels were never scanned. Nearly every region is opaque and takes the fast path.
    """
    # As little-endian words alpha is the top byte, so the least word is opaque only if all are.
    if np.ascontiguousarray(rgba).view("<u4").min() >= 0xFF000000:
        return cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    weight = rgba[..., 3:].astype(np.float32) / 255
    background = np.asarray(background_rgb, np.float32)
    blended = rgba[..., :3] * weight + background * (1 - weight)
    return np.rint(blended).astype(np.uint8)


def _open(path: str) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError("not_a_slide", f"no reader knows the format of {path}") from error
    except (openslide.OpenSlideError, OSError) as error:
        raise SlideError(
            "decode_error", f"OpenSlide cannot open {path}: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """What OpenSlide says, without what it quotes from the file: that may name a patient."""
    return _FROM_FILE.sub("(...)", str(error))


def _background(slide: openslide.OpenSlide) -> tuple[int, int, int]:
    text = slide.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "")
    try:
        red, green, blue = bytes.fromhex(text)
    except ValueError:
        return (255, 255, 255)
    return (red, green, blue)


def _read_info(slide: openslide.OpenSlide, reason: str) -> SlideInfo:
    dimensions = tuple((int(w), int(h)) for w, h in slide.level_dimensions)
    properties = slide.properties
    try:
        objective = float(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER, ""))
    except ValueError:
        objective = 0.0
    mpp_x = plausible_mpp(properties.get(openslide.PROPERTY_NAME_MPP_X))
    mpp_y = plausible_mpp(properties.get(openslide.PROPERTY_NAME_MPP_Y))
    return SlideInfo(
        width_px_level0=dimensions[0][0],
        height_px_level0=dimensions[0][1],
        level_dimensions=dimensions,
        level_downsamples=level_downsamples(dimensions),
        mpp_x=mpp_x if mpp_y is not None else None,
        mpp_y=mpp_y if mpp_x is not None else None,
        objective_power=objective if objective > 0 else None,
        vendor=properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
        reader="openslide",
        reader_reason=reason,
    )
