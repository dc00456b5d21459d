"""Decoding of one JPEG tile, strictly: a damaged tile is an error, not grey pixels.

libjpeg repairs a damaged stream with a warning and invented pixels. `simplejpeg` reports the
warning, as OpenSlide does; `imagecodecs` does not, so behind it the signs of damage are looked for
by hand, and some go unseen.
"""

from __future__ import annotations

from collections.abc import Callable

import imagecodecs
import numpy as np

from cytoray.errors import SlideError, choose

try:
    import simplejpeg  # pyright: ignore[reportMissingImports]
except ImportError:
    simplejpeg = None

# decode(stream, tables, is_ycbcr, out uint8 (h, w, 3)) fills `out` or raises SlideError.
TileDecoder = Callable[[bytes, bytes, bool, np.ndarray], None]

START = b"\xff\xd8"
END = b"\xff\xd9"
START_OF_SCAN = b"\xff\xda"
RESTART_INTERVAL = b"\xff\xdd"


def splice_tables(stream: bytes, tables: bytes, is_ycbcr: bool) -> bytes:
    """Make an abbreviated TIFF tile a complete JPEG that states its colour space.

    The shared tables (TIFF tag 347) go in front, with an Adobe APP14 segment whose transform flag
    says YCbCr (1) or RGB (0), as the photometric tag does.
    """
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x01" if is_ycbcr else b"\x00")
    return START + adobe + tables[2:-2] + stream[2:]


def decode_strict(stream: bytes, tables: bytes, is_ycbcr: bool, out: np.ndarray) -> None:
    """Decode with simplejpeg (libjpeg-turbo), where every libjpeg warning is an error."""
    assert simplejpeg is not None
    complete = splice_tables(stream, tables, is_ycbcr)
    try:
        pixels = simplejpeg.decode_jpeg(complete, buffer=out, strict=True)
    except (ValueError, RuntimeError) as error:
        raise SlideError("decode_error", f"JPEG tile: {error}") from error
    if pixels.shape != out.shape:
        raise SlideError("decode_error", f"JPEG tile of {pixels.shape}, not {out.shape}")


def decode_inspected(stream: bytes, tables: bytes, is_ycbcr: bool, out: np.ndarray) -> None:
    """Decode with imagecodecs (libjpeg-turbo) and look for signs of damage afterwards."""
    problem = damage_in_stream(stream)
    if problem:
        raise SlideError("decode_error", f"JPEG tile: {problem}")
    _decode_loosely(stream, tables, is_ycbcr, out)
    # libjpeg leaves the blocks it has no data for at mid grey, down to the last corner. A corner
    # that is truly grey does not change when more data follow.
    if bool((out[-4:, -4:] == 128).all()):
        end = stream.rfind(END)
        longer = np.empty_like(out)
        _decode_loosely(stream[:end] + b"\x55" * 64 + END, tables, is_ycbcr, longer)
        if not np.array_equal(out, longer):
            raise SlideError("decode_error", "JPEG tile: premature end of data")


def _decode_loosely(stream: bytes, tables: bytes, is_ycbcr: bool, out: np.ndarray) -> None:
    try:
        imagecodecs.jpeg8_decode(
            stream,
            tables=tables or None,
            colorspace="YCBCR" if is_ycbcr else "RGB",
            outcolorspace="RGB",
            out=out,
        )
    except (imagecodecs.Jpeg8Error, ValueError) as error:
        raise SlideError("decode_error", f"JPEG tile: {error}") from error


def damage_in_stream(stream: bytes) -> str:
    """Signs of damage visible without decoding; an empty string when there is none.

    Entropy-coded data holds 0xFF only as a stuffed FF00, a restart marker, or the end marker.
    """
    if not stream.startswith(START):
        return "it does not start like a JPEG"
    scan = stream.find(START_OF_SCAN)
    if scan < 0:
        return "it has no scan"
    end = stream.rfind(END)
    if end < scan:
        return "it has no end"
    markers = stream.count(b"\xff", scan + 2, end)
    markers -= stream.count(b"\xff\x00", scan + 2, end)
    if markers and RESTART_INTERVAL not in stream[:scan]:
        return "a marker inside the data"
    return ""


TILE_DECODERS: dict[str, TileDecoder] = {"imagecodecs": decode_inspected}
if simplejpeg is not None:
    TILE_DECODERS["simplejpeg"] = decode_strict


def tile_decoder(name: str = "auto") -> TileDecoder:
    """The decoder called `name`; `auto` takes simplejpeg where it is installed."""
    if name == "auto":
        name = "simplejpeg" if "simplejpeg" in TILE_DECODERS else "imagecodecs"
    return TILE_DECODERS[choose("JPEG tile decoder", name, TILE_DECODERS)]
