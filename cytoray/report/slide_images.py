"""Small pictures of one slide for the quality page: plain numpy, quick enough for a CPU actor."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage

QC_IMAGE_PX = 512
_OUTLINE_RGB = (0, 114, 178)


def qc_images(
    thumbnail: np.ndarray,
    mask: np.ndarray,
    nuclei_xy_thumb: np.ndarray,
    max_px: int = QC_IMAGE_PX,
    quality: int = 82,
    focus: np.ndarray | None = None,
    focus_span_thumb: tuple[float, float] | None = None,
) -> dict[str, bytes]:
    """The pictures of a slide's row on the quality page.

    Args:
        thumbnail: uint8 (h, w, 3).
        mask: bool foreground of any size, scaled to the thumbnail.
        nuclei_xy_thumb: float (n, 2), nuclei in pixels of `thumbnail`.
        max_px: longest side of the pictures.
        quality: of the JPEG.
        focus: float (tile_rows, tile_columns), 0 blurred to 1 sharp, NaN unknown; None when it was
            not measured.
        focus_span_thumb: (width, height) that the tiles of `focus` cover from the top-left corner,
            in pixels of `thumbnail`; None: all of it.

    Returns:
        JPEG bytes under `thumbnail`, `foreground`, `density` and, where `focus` is given, `focus`.
    """
    thumbnail = check_rgb("thumbnail", thumbnail)
    height, width = thumbnail.shape[:2]
    scale = min(1.0, max_px / max(height, width))
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    small = np.asarray(Image.fromarray(thumbnail).resize(size, Image.Resampling.BOX))
    xy = np.asarray(nuclei_xy_thumb, dtype=float).reshape(-1, 2) * (size[0] / width)
    images = {
        "thumbnail": small,
        "foreground": fade_background(small, resize_mask(mask, small.shape[:2])),
        "density": blend_density(small, xy),
    }
    if focus is not None:
        span = focus_span_thumb or (width, height)
        images["focus"] = blend_focus(
            small, focus, (span[0] * size[0] / width, span[1] * size[1] / height)
        )
    return {name: encode_jpeg(pixels, quality) for name, pixels in images.items()}


def focus_image(
    scores: np.ndarray,
    thumbnail: np.ndarray,
    span_thumb: tuple[float, float] | None = None,
    quality: int = 82,
) -> bytes:
    """JPEG of a slide's focus: tiles from purple (blurred) to yellow (sharp) on the pale slide.

    Args:
        scores: float (tile_rows, tile_columns), 0 blurred to 1 sharp, NaN unknown.
        thumbnail: uint8 (h, w, 3).
        span_thumb: see `blend_focus`.
        quality: of the JPEG.
    """
    return encode_jpeg(blend_focus(check_rgb("thumbnail", thumbnail), scores, span_thumb), quality)


def encode_jpeg(pixels: np.ndarray, quality: int = 82) -> bytes:
    """JPEG bytes of uint8 (h, w, 3), without any metadata."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=quality)
    return stream.getvalue()


def resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Nearest-neighbour resize of a bool mask to (height, width)."""
    image = Image.fromarray(np.asarray(mask, dtype=bool).astype(np.uint8) * 255)
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.NEAREST)) > 127


def fade_background(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Keep the foreground's colours, bleach the rest to grey, draw the outline in blue.

    Args:
        rgb: uint8 (h, w, 3).
        mask: bool (h, w).
    """
    grey = rgb.mean(axis=2, keepdims=True)
    faded = np.where(mask[..., None], rgb, 0.35 * grey + 0.65 * 205)
    outline = mask & np.logical_not(ndimage.binary_erosion(mask, border_value=True))
    faded[outline] = _OUTLINE_RGB
    return faded.astype(np.uint8)


def blend_density(rgb: np.ndarray, nuclei_xy_px: np.ndarray) -> np.ndarray:
    """Colour a pale grey copy of `rgb` by smoothed nuclei counts (viridis, clear where none).

    Args:
        rgb: uint8 (h, w, 3).
        nuclei_xy_px: float (n, 2) in its pixels; those outside are left out.
    """
    height, width = rgb.shape[:2]
    pale = _pale(rgb)
    counts, _, _ = np.histogram2d(
        nuclei_xy_px[:, 1],
        nuclei_xy_px[:, 0],
        bins=(height, width),
        range=((0, height), (0, width)),
    )
    density = ndimage.gaussian_filter(counts, sigma=max(height, width) / 32, mode="constant")
    peak = density.max()
    if peak <= 0:
        return pale.astype(np.uint8)
    level = density / peak
    colors = _viridis_rgb(level)
    alpha = np.clip(level * 4, 0, 0.85)[..., None]
    return ((1 - alpha) * pale + alpha * colors).astype(np.uint8)


def blend_focus(
    rgb: np.ndarray, scores: np.ndarray, span_px: tuple[float, float] | None = None
) -> np.ndarray:
    """Colour a pale grey copy of `rgb` by the focus of its tiles (viridis from 0 to 1).

    The colours mean the same on every slide. Tiles of unknown focus stay grey.

    Args:
        rgb: uint8 (h, w, 3).
        scores: float (tile_rows, tile_columns), 0 blurred to 1 sharp, NaN unknown.
        span_px: (width, height) that the tiles cover from the top-left corner, in pixels of `rgb`
            (whole tiles alone exist, so this is a little less than all); None: all of it.

    Raises:
        ValueError: `scores` has another number of dimensions.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2:
        raise ValueError(f"focus scores must be (tile_rows, tile_columns), not {scores.shape}")
    height, width = rgb.shape[:2]
    pale = _pale(rgb)
    if not scores.size:
        return pale.astype(np.uint8)
    span_x, span_y = span_px or (width, height)
    columns = np.floor((np.arange(width) + 0.5) / span_x * scores.shape[1]).astype(int)
    rows = np.floor((np.arange(height) + 0.5) / span_y * scores.shape[0]).astype(int)
    padded = np.pad(scores, ((0, 1), (0, 1)), constant_values=np.nan)
    spread = padded[np.minimum(rows, scores.shape[0])][:, np.minimum(columns, scores.shape[1])]
    known = np.isfinite(spread)
    level = np.clip(np.where(known, spread, 0.0), 0.0, 1.0)
    colors = _viridis_rgb(level)
    alpha = np.where(known, 0.75, 0.0)[..., None]
    return ((1 - alpha) * pale + alpha * colors).astype(np.uint8)


def _pale(rgb: np.ndarray) -> np.ndarray:
    """A light grey copy on which colours stand out: float (h, w, 3)."""
    grey = 128 + rgb.mean(axis=2, keepdims=True) / 2
    return np.repeat(grey, 3, axis=2)


def _viridis_rgb(level: np.ndarray) -> np.ndarray:
    """Float (..., 3), 0 to 255, of levels from 0 to 1."""
    import matplotlib  # here: whoever reads slides without drawing any need not wait for it

    return matplotlib.colormaps["viridis"](level)[..., :3] * 255


def check_rgb(name: str, image: np.ndarray) -> np.ndarray:
    """Return `image` as an array if it is uint8 (h, w, 3).

    Raises:
        ValueError: another shape or dtype.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{name} must be uint8 (h, w, 3), not {image.dtype} {image.shape}")
    return image
