"""A field of cells in the making: where bodies are put, how light passes, and the truth.

Lengths are working pixels (`small.WORK_UM`).
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from cytoray.nuclei.small import WORK_UM
from cytoray.nuclei.small_bodies import Nucleus, paint_nucleus
from cytoray.synthetic.textures import Float, smooth_noise

MIN_RADIUS_PX, MAX_RADIUS_PX = 1.7 / WORK_UM, 15.0 / WORK_UM
MARGIN_PX = 20  # bodies may lie this far outside, so that some are cut by the edge


class Scene:
    """A field in the making.

    Args:
        rng: the source of randomness.
        side_px: side of the square field.

    Attributes:
        absorbance: float32 (side, side, 3), natural log, of red, green and blue.
        nuclei: rows (x_px, y_px, radius_px).
        radius_px: usual radius of a nucleus.
        step: usual absorbance that a nucleus adds, mean of the channels.
        nuclear, counterstains: colours of the dyes, float32 (3,), mean 1.
    """

    def __init__(self, rng: np.random.Generator, side_px: int) -> None:
        self.rng = rng
        self.side_px = side_px
        self.absorbance = np.zeros((side_px, side_px, 3), np.float32)
        self.nuclei: list[tuple[float, float, float]] = []
        self.radius_px = log_uniform(rng, 2.0, 9.0) / WORK_UM
        self.step = log_uniform(rng, 0.3, 1.7)
        self.nuclear = dye(rng, 0.25)
        self.counterstains = [dye(rng, 0.8) for _ in range(int(rng.integers(1, 4)))]
        self.edge_px = float(rng.uniform(0.3, 1.2))

    def anywhere(self) -> tuple[float, float]:
        """A place in the field or just outside."""
        x, y = self.rng.uniform(-MARGIN_PX, self.side_px + MARGIN_PX, 2)
        return float(x), float(y)

    def region(self, x: float, y: float, patch: Float) -> tuple[tuple[slice, slice], Float] | None:
        """Where a patch (h, w) centred at x, y lies, and the part of it that is in the field."""
        height, width = patch.shape
        left, top = round(x - (width - 1) / 2), round(y - (height - 1) / 2)
        rows = slice(max(0, top), min(self.side_px, top + height))
        columns = slice(max(0, left), min(self.side_px, left + width))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return None
        part = patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        return (rows, columns), part

    def add(self, x: float, y: float, dose: Float, colour: Float) -> None:
        """Add a body's dose (h, w) of one dye, centred at x, y."""
        found = self.region(x, y, dose)
        if found is not None:
            self.absorbance[found[0]] += found[1][..., None] * colour

    def add_nucleus(self, x: float, y: float, nucleus: Nucleus) -> bool:
        """Put a nucleus at x, y unless it would hide another; it displaces some cytoplasm.

        It always adds `step` on top of what it displaces: no stain leaves nuclei the paler part.
        """
        x, y = float(round(x)), float(round(y))  # the patch lies on whole pixels: keep truth exact
        centre_x, centre_y = x + nucleus.offset_px[0], y + nucleus.offset_px[1]
        for other_x, other_y, other_radius in self.nuclei:
            gap = math.hypot(centre_x - other_x, centre_y - other_y)
            if gap < max(0.8 * (nucleus.radius_px + other_radius), 1.05 * other_radius):
                return False
        found = self.region(x, y, nucleus.mask)
        if found is None:
            return False
        where, mask = found
        inner = self.region(x, y, nucleus.dose)
        assert inner is not None
        below = self.absorbance[where]
        level = float((below.mean(axis=2) * mask).sum() / max(float(mask.sum()), 1e-3))
        displaced = self.rng.uniform(0, 0.6)
        step = self.step * np.exp(self.rng.normal(0, 0.2)) + 0.3 * level + displaced * level
        below *= 1 - displaced * mask[..., None]
        below += (inner[1] * np.float32(step))[..., None] * self.nuclear
        self.nuclei.append((centre_x, centre_y, nucleus.radius_px))
        return True

    def draw_nucleus(self, scale: float = 1.0, kinds: tuple[str, ...] = ("plain",)) -> Nucleus:
        """A nucleus of the scene's usual size times `scale`, of one of `kinds`."""
        radius = self.radius_px * scale * np.exp(self.rng.normal(0, 0.15))
        radius = float(np.clip(radius, MIN_RADIUS_PX, MAX_RADIUS_PX))
        return paint_nucleus(self.rng, str(self.rng.choice(kinds)), radius, self.edge_px)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def dye(rng: np.random.Generator, spread: float) -> Float:
    """Colour of a dye: absorbance of red, green and blue, mean 1, float32 (3,)."""
    colour = np.exp(rng.normal(0, spread, 3))
    if spread < 0.5:  # nuclear dyes pass blue best, whatever their name
        colour = colour * (1.0, 1.15, rng.uniform(0.4, 1.0))
    return np.asarray(colour / colour.mean(), np.float32)


def nuclei_inside(scene: Scene) -> Float:
    """Nuclei whose centre is in the field, float32 (N, 3)."""
    nuclei = np.array(scene.nuclei, np.float32).reshape(-1, 3)
    inside = ((nuclei[:, :2] > -0.5) & (nuclei[:, :2] < scene.side_px - 0.5)).all(axis=1)
    return nuclei[inside]


def expose(scene: Scene) -> NDArray[np.uint8]:
    """Light through the field: glass of some colour, uneven lamp; uint8 (side, side, 3)."""
    rng, side = scene.rng, scene.side_px
    glass = rng.uniform(150, 252) + rng.normal(0, 10, 3)
    lamp = 1 + 0.03 * smooth_noise(rng, side, side, side / 2)
    slope = np.linspace(-1, 1, side, dtype=np.float32)
    lamp = lamp + rng.normal(0, 0.05) * slope[:, None] + rng.normal(0, 0.05) * slope[None]
    light = cv2.exp(-scene.absorbance) * lamp[..., None] * np.clip(glass, 120, 255)
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)
