"""Per-slide staining and optics: Papanicolaou dye absorbances, jittered so that colour is no label.

A pixel is `background * exp(-sum(dose * absorbance))` (Beer-Lambert), so overlapping transparent
cells darken each other as they do on glass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

# Absorbance (natural log) of red, green and blue light at dose 1.
DYES: dict[str, tuple[float, float, float]] = {
    "haematoxylin": (1.00, 1.12, 0.34),
    "lavender": (0.23, 0.24, 0.08),
    "light_green": (0.52, 0.24, 0.20),
    "eosin": (0.05, 0.50, 0.19),
    "orange_g": (0.03, 0.42, 0.85),
}
CYTOPLASM_DYES = ("lavender", "light_green", "eosin", "orange_g")


@dataclass(frozen=True, kw_only=True)
class Stain:
    """How one slide is stained and seen.

    Attributes:
        absorbance: per dye, float32 (3,) for red, green, blue at dose 1.
        cytoplasm_shares: float64 (4,), how often each of `CYTOPLASM_DYES` colours a cell.
        background_rgb: float32 (3,), colour of clear glass, 0 to 255.
        focus_um: blur of a cell in good focus, Gaussian sigma.
    """

    absorbance: dict[str, Float]
    cytoplasm_shares: NDArray[np.float64]
    background_rgb: Float
    focus_um: float


def sample_stain(rng: np.random.Generator, site_rng: np.random.Generator) -> Stain:
    """Draw one slide's staining.

    Args:
        rng: randomness of this slide: the larger part of the variation.
        site_rng: randomness of the slide's site, the same for all its slides: a mild batch effect.
    """
    absorbance = {}
    for name, values in DYES.items():
        dose = np.exp(site_rng.normal(0, 0.10) + rng.normal(0, 0.22))
        hue = np.exp(site_rng.normal(0, 0.05, 3) + rng.normal(0, 0.10, 3))
        absorbance[name] = np.asarray(np.array(values) * dose * hue, np.float32)
    shares = rng.dirichlet(np.array([4.0, 3.2, 3.0, 0.5]))
    brightness = site_rng.normal(224, 3) + rng.normal(0, 7)
    tint = site_rng.normal(0, 1.5, 3) + rng.normal(0, 2.5, 3)
    return Stain(
        absorbance=absorbance,
        cytoplasm_shares=shares,
        background_rgb=np.clip(brightness + tint, 195, 246).astype(np.float32),
        focus_um=float(rng.uniform(0.14, 0.32)),
    )
