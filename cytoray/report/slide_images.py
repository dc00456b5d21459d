"""Small pictures of one slide for the quality page: plain numpy, quick enough for a CPU actor."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from PIL import Image
from scipy import ndimage

from cytoray.report.style import check_rgb

QC_IMAGE_PX = 512
_OUTLINE_RGB = (0, 114, 178)


def qc_images(
    thumbnail: np.ndarray,
    mask: np.ndarray,
    nuclei_xy_thumb: np.ndarray,
    max_px: int = QC_IMAGE_PX,
    quality: int = 82,
) -> dict[str, bytes]:
    """The three pictures of a slide's row on the quality page.

    Args:
        thumbnail: uint8 (h, w, 3).
        mask: bool foreground of any size, scaled to the thumbnail.
        nuclei_xy_thumb: float (n, 2), nuclei in pixels of `thumbnail`.
        max_px: longest side of the pictures.
        quality: of the JPEG.

    Returns:
        JPEG bytes under `thumbnail`, `foreground`, `density`.
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
    return {name: encode_jpeg(pixels, quality) for name, pixels in images.items()}


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
    grey = 128 + rgb.mean(axis=2, keepdims=True) / 2
    pale = np.repeat(grey, 3, axis=2)
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
    colors = matplotlib.colormaps["viridis"](level)[..., :3] * 255
    alpha = np.clip(level * 4, 0, 0.85)[..., None]
    return ((1 - alpha) * pale + alpha * colors).astype(np.uint8)
