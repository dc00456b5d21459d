"""Other looks of labelled fields: what another stain, scanner or scale would have made of them.

Colours are changed in optical density: how much nuclear stain (`nuclear_density`) and how much of
anything else lies on a pixel is kept, and shown in the colours of another stain.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from cytoray.nuclei import black_border, nuclear_density

Look = Callable[[np.ndarray], np.ndarray]
_OFFSET = 4.0  # grey levels, as in `nuclear_density`
_WHITE = 255 + _OFFSET
# Optical density in red, green and blue of what absorbs 1 as nuclear stain, and as anything else.
GIEMSA = ((0.8, 1.15, 0.55), (0.45, 0.35, 0.2))
HEMATOXYLIN_EOSIN = ((1.0, 1.05, 0.5), (0.1, 0.9, 0.4))


def _density(pixels: np.ndarray) -> np.ndarray:
    """Optical density above the glass: uint8 (h, w, 3) to float32 (h, w, 3)."""
    density = -np.log10((pixels.astype(np.float32) + _OFFSET) / _WHITE)
    return np.maximum(density - np.quantile(density.reshape(-1, 3), 0.05, axis=0), 0)


def _light(density: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(_WHITE * 10**-density - _OFFSET), 0, 255).astype(np.uint8)


def restained(
    pixels: np.ndarray, nuclear: tuple[float, ...], other: tuple[float, ...]
) -> np.ndarray:
    """The field in another stain; black borders stay black."""
    nuclei = nuclear_density(pixels)
    rest = np.maximum(_density(pixels).mean(axis=2) - nuclei, 0)
    light = _light(nuclei[..., None] * np.array(nuclear) + rest[..., None] * np.array(other))
    light[black_border(pixels, 1.0, 100.0)] = 0
    return light


def noisy(pixels: np.ndarray) -> np.ndarray:
    """Camera noise of 10 grey levels."""
    noise = np.random.default_rng(0).normal(0, 10, pixels.shape)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


def grey(pixels: np.ndarray) -> np.ndarray:
    """A monochrome camera."""
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def resized(factor: float) -> Look:
    """Another magnification."""
    return lambda pixels: np.asarray(
        cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA
                   if factor < 1 else cv2.INTER_CUBIC), np.uint8,
    )  # fmt: skip


# Name -> the look, and its pixels per pixel of the field.
LOOKS: dict[str, tuple[Look, float]] = {
    "as it is": (lambda pixels: pixels, 1.0),
    "grey": (grey, 1.0),
    "half the stain": (lambda pixels: _light(_density(pixels) / 2), 1.0),
    "Giemsa": (lambda pixels: restained(pixels, *GIEMSA), 1.0),
    "H&E": (lambda pixels: restained(pixels, *HEMATOXYLIN_EOSIN), 1.0),
    "darker": (lambda pixels: (pixels * 0.6).astype(np.uint8), 1.0),
    "out of focus": (lambda pixels: cv2.GaussianBlur(pixels, (0, 0), 2.0), 1.0),
    "noisy": (noisy, 1.0),
    "coarser": (resized(0.6), 0.6),
    "finer": (resized(2.0), 2.0),
}
