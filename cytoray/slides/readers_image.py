"""A photograph of a field of view (PNG, JPEG, BMP, plain TIFF) as a slide of one level."""

from __future__ import annotations

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from cytoray.errors import SlideError
from cytoray.slides.readers_base import SlideInfo, SlideReader, plausible_mpp

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
# The whole picture is held in memory; bigger ones belong in a tiled pyramid.
MAX_IMAGE_PX = 400_000_000
UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}


class ImageReader(SlideReader):
    """A whole picture held in memory.

    The file says nothing of optics except in a TIFF's resolution tags, so the manifest's `mpp`
    column is needed for the others (a density such as 72 or 300 dpi concerns printing).

    Raises:
        SlideError: `not_a_slide`, `image_too_large`, or `decode_error`.
    """

    def __init__(self, path: str, reason: str = "a single picture") -> None:
        self._pixels: np.ndarray | None = _load(path)
        height, width = self._pixels.shape[:2]
        mpp_x, mpp_y = tiff_resolution_mpp(path)
        self.info = SlideInfo(
            width_px_level0=width,
            height_px_level0=height,
            level_dimensions=((width, height),),
            level_downsamples=(1.0,),
            mpp_x=mpp_x,
            mpp_y=mpp_y,
            objective_power=None,
            vendor="image",
            reader="image",
            reader_reason=reason,
        )

    def close(self) -> None:
        self._pixels = None

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        if self._pixels is None:
            raise ValueError("the image reader is closed")
        return self._pixels[y : y + height, x : x + width].copy()


def _load(path: str) -> np.ndarray:
    """uint8 (h, w, 3) of the first frame; transparency is laid on white."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_IMAGE_PX:
                raise SlideError(
                    "image_too_large",
                    f"{path} has {image.width}x{image.height} px in one piece; "
                    "convert it to a tiled pyramidal TIFF",
                )
            if image.mode.startswith(("I", "F")):
                raise SlideError("not_a_slide", f"{path} is not an 8-bit picture ({image.mode})")
            if "A" in image.getbands() or "transparency" in image.info:
                rgba = image.convert("RGBA")
                white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
                return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise SlideError("not_a_slide", f"no reader knows the format of {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SlideError("decode_error", f"{path} cannot be decoded: {error}") from error


def tiff_resolution_mpp(path: str) -> tuple[float | None, float | None]:
    """um per pixel (x, y) from a TIFF's resolution tags in cm or inch; (None, None) without."""
    try:
        with tifffile.TiffFile(path) as tiff:
            tags = tiff.pages.first.tags
            unit = UM_PER_UNIT[int(tags["ResolutionUnit"].value)]
            mpp = []
            for name in ("XResolution", "YResolution"):
                numerator, denominator = tags[name].value
                mpp.append(plausible_mpp(unit * denominator / numerator))
    except (tifffile.TiffFileError, OSError, KeyError, ValueError, TypeError, ZeroDivisionError):
        return None, None
    return (mpp[0], mpp[1]) if None not in mpp else (None, None)
