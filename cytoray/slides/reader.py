"""Opening a slide: a ladder of readers, fastest first, each step down with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cytoray.errors import SlideError, choose
from cytoray.slides.readers_base import SlideInfo, SlideReader, check_file
from cytoray.slides.readers_image import IMAGE_SUFFIXES, ImageReader, tiff_resolution_mpp
from cytoray.slides.readers_openslide import OpenSlideReader
from cytoray.slides.readers_tiff import NotNativeError, TiffReader, verify_against
from cytoray.slides.remote import StagedSlide, default_cache, is_remote, local_path, redact

__all__ = ["READERS", "SlideInfo", "SlideReader", "open_slide"]


def open_slide(path: str, *, reader: str = "auto", verify: bool = True) -> SlideReader:
    """Open a slide for reading; use it as a context manager.

    Args:
        path: a local file, or any URL that fsspec knows; that file is brought to this node's
            cache first and stays there at least as long as the reader is open.
        reader: `auto` (the fast tile reader where its pixels equal OpenSlide's, else OpenSlide,
            else a plain picture), or one of `tiff`, `openslide`, `image` to insist.
        verify: compare the fast reader with OpenSlide at opening (tens of milliseconds). Pass
            False only for a slide that was verified before, e.g. when indexing.

    Returns:
        A reader; `reader.info` is a `SlideInfo` with the reader chosen and why.

    Raises:
        InputError: an unknown reader name.
        SlideError: `missing_file`, `empty_file`, `unreadable_file`, `truncated`, `not_a_slide`,
            `decode_error`, `image_too_large`, or `reader_unfit` when the reader insisted on
            cannot serve the file; for a URL also the codes of `SlideCache.stage`.
    """
    opener = READERS[choose("slide reader", reader, READERS)]
    if is_remote(path):
        return _open_staged(path, opener, verify)
    path = local_path(path)
    check_file(path)
    return opener(path, verify)


class StagedReader(SlideReader):
    """A reader of a file in the node's cache, which may be removed once this is closed."""

    def __init__(self, reader: SlideReader, staged: StagedSlide) -> None:
        self.info = reader.info
        self._reader = reader
        self._staged = staged

    def close(self) -> None:
        self._reader.close()
        self._staged.release()

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        return self._reader.read_level(level, x, y, width, height)


def _open_staged(url: str, opener: Callable[[str, bool], SlideReader], verify: bool) -> SlideReader:
    staged = default_cache().stage(url)
    try:
        check_file(staged.path)
        return StagedReader(opener(staged.path, verify), staged)
    except BaseException as error:
        staged.release()
        if not isinstance(error, SlideError):
            raise
        message = error.message.replace(staged.path, redact(url))
        raise SlideError(error.code, message, error.region) from error


def _open_auto(path: str, verify: bool) -> SlideReader:
    lower = path.lower()
    if lower.endswith(IMAGE_SUFFIXES) and not lower.endswith((".tif", ".tiff")):
        return ImageReader(path)
    try:
        reference = OpenSlideReader(path)
    except SlideError as error:
        if error.code != "not_a_slide" or not lower.endswith(IMAGE_SUFFIXES):
            raise
        return ImageReader(path, "OpenSlide knows no such format; read as one picture")
    _complete_mpp(reference, path)
    fast, reason = _try_fast(path, reference, verify)
    if fast is None:
        reference.info = replace(reference.info, reader_reason=reason)
        return reference
    reference.close()
    return fast


def _open_tiff(path: str, verify: bool) -> SlideReader:
    with OpenSlideReader(path) as reference:
        assert isinstance(reference, OpenSlideReader)
        _complete_mpp(reference, path)
        fast, reason = _try_fast(path, reference, verify)
    if fast is None:
        raise SlideError("reader_unfit", f"the fast reader cannot serve {path}: {reason}")
    return fast


def _open_openslide(path: str, verify: bool) -> SlideReader:
    reader = OpenSlideReader(path)
    _complete_mpp(reader, path)
    return reader


def _open_image(path: str, verify: bool) -> SlideReader:
    return ImageReader(path, "a single picture was asked for")


# A new reader is one file with a SlideReader and one entry here.
READERS: dict[str, Callable[[str, bool], SlideReader]] = {
    "auto": _open_auto,
    "tiff": _open_tiff,
    "openslide": _open_openslide,
    "image": _open_image,
}


def _try_fast(path: str, reference: OpenSlideReader, verify: bool) -> tuple[TiffReader | None, str]:
    """The fast reader if it serves this file with the same pixels, else None and the reason."""
    try:
        fast = TiffReader(path, reference.info)
    except NotNativeError as error:
        return None, str(error)
    difference = verify_against(fast, reference) if verify else ""
    if difference:
        fast.close()
        return None, difference
    return fast, ""


def _complete_mpp(reader: OpenSlideReader, path: str) -> None:
    """Take um/px from the TIFF's own resolution tags where OpenSlide reports none."""
    if reader.info.mpp_x is not None or reader.info.vendor != "generic-tiff":
        return
    mpp_x, mpp_y = tiff_resolution_mpp(path)
    reader.info = replace(reader.info, mpp_x=mpp_x, mpp_y=mpp_y)
