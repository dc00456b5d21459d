"""Lay rendered bodies out on clear glass: positions, overlaps, clumps, and the truth of each."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from cytoray.synthetic.cells import CellPatch, oriented
from cytoray.synthetic.stain import Stain
from cytoray.synthetic.textures import smooth_noise

MAX_TRIES = 14
NOISE_BLOCK_PX = 512


class Scene:
    """A slide in the making: pixels, and what has been put on them.

    Args:
        rng: the source of randomness.
        stain: the slide's staining.
        size_px: side of the slide at level 0.
        mpp: um per pixel at level 0.

    Attributes:
        pixels: uint8 (size, size, 3).
        nuclei: rows (x_level0, y_level0, radius_px, kind) in the order of placing.
        boxes: x, y, w, h at level 0 of each abnormal cell.
    """

    def __init__(self, rng: np.random.Generator, stain: Stain, size_px: int, mpp: float) -> None:
        self.rng = rng
        self.size_px = size_px
        self.mpp = mpp
        self.pixels = _glass(rng, stain, size_px)
        self.nuclei: list[tuple[float, float, float, str]] = []
        self.boxes: list[tuple[int, int, int, int]] = []
        self._richness = smooth_noise(rng, 64, 64, 20.0)
        self._bodies: list[tuple[float, float, float]] = []

    def scatter(self, patch: CellPatch, *, cluster_chance: float, inside: bool = False) -> bool:
        """Put one body down where cells are many, sometimes touching an earlier one.

        Args:
            patch: the body; it is turned or mirrored at random.
            cluster_chance: chance of landing against an earlier body.
            inside: keep it wholly inside the slide.

        Returns:
            False when no free place was found.
        """
        patch = oriented(patch, int(self.rng.integers(8)))
        for attempt in range(MAX_TRIES):
            grouped = bool(self._bodies) and self.rng.random() < cluster_chance
            x, y = self._beside(patch) if grouped else self._open_place(patch, inside)
            relaxed = grouped or attempt >= MAX_TRIES // 2
            if not self._fits(patch, x, y, inside) or (not relaxed and self._touches(patch, x, y)):
                continue
            self._paste(patch, x, y)
            self._bodies.append((x, y, patch.reach_px))
            return True
        return False

    def clump(self, patches: Sequence[CellPatch], spacing_px: float) -> None:
        """Heap bodies up around one place, as white blood cells do."""
        centre = self.rng.uniform(0, self.size_px, 2)
        spread_px = spacing_px * np.sqrt(len(patches))
        for patch in patches:
            turned = oriented(patch, int(self.rng.integers(8)))
            for _ in range(MAX_TRIES):
                x, y = centre + self.rng.normal(0, 0.5 * spread_px, 2)
                if self._fits(turned, x, y, inside=False):
                    self._paste(turned, x, y)
                    break

    def finish(self) -> NDArray[np.uint8]:
        """Add the camera's noise and return the pixels, uint8 (size, size, 3)."""
        block = (NOISE_BLOCK_PX, NOISE_BLOCK_PX, 3)
        noise = self.rng.standard_normal(block, dtype=np.float32) * self.rng.uniform(0.9, 1.8)
        noise = np.round(noise).astype(np.int8)
        brighter = np.maximum(noise, 0).astype(np.uint8)
        darker = np.maximum(-noise, 0).astype(np.uint8)
        for top in range(0, self.size_px, NOISE_BLOCK_PX):
            for left in range(0, self.size_px, NOISE_BLOCK_PX):
                view = self.pixels[top : top + NOISE_BLOCK_PX, left : left + NOISE_BLOCK_PX]
                height, width = view.shape[:2]
                lit = cv2.add(view, brighter[:height, :width])
                view[:] = cv2.subtract(lit, darker[:height, :width])
        return self.pixels

    def _open_place(self, patch: CellPatch, inside: bool) -> tuple[float, float]:
        rows, columns = self._richness.shape
        margin = max(patch.transmittance.shape[:2]) / 2 + 1 if inside else 0.0
        margin = min(margin, self.size_px / 2)
        x, y = 0.0, 0.0
        for _ in range(6):
            x, y = self.rng.uniform(margin, self.size_px - margin, 2)
            row, column = int(y / self.size_px * rows), int(x / self.size_px * columns)
            if self.rng.random() < 1 / (1 + np.exp(-2.5 * self._richness[row, column])):
                break
        return float(x), float(y)

    def _beside(self, patch: CellPatch) -> tuple[float, float]:
        x, y, reach_px = self._bodies[int(self.rng.integers(len(self._bodies)))]
        angle = self.rng.uniform(0, 2 * np.pi)
        away_px = self.rng.uniform(0.55, 1.0) * (reach_px + patch.reach_px)
        return x + away_px * np.cos(angle), y + away_px * np.sin(angle)

    def _touches(self, patch: CellPatch, x: float, y: float) -> bool:
        if not self._bodies:
            return False
        bodies = np.asarray(self._bodies)
        gap = np.hypot(bodies[:, 0] - x, bodies[:, 1] - y) - 0.85 * (bodies[:, 2] + patch.reach_px)
        return bool((gap < 0).any())

    def _fits(self, patch: CellPatch, x: float, y: float, inside: bool) -> bool:
        """Whether nuclei stay apart (or debris off nuclei), and the body inside if it must be."""
        half = np.array(patch.transmittance.shape[1::-1]) / 2
        if inside and (
            min(x - half[0], y - half[1]) < 1 or max(x + half[0], y + half[1]) > self.size_px - 2
        ):
            return False
        if not (0 <= x < self.size_px and 0 <= y < self.size_px):
            return False
        if not self.nuclei:
            return True
        placed = np.array([row[:3] for row in self.nuclei])
        if len(patch.nuclei_px):
            own = patch.nuclei_px + np.array([x - half[0], y - half[1], 0.0])
        else:
            own = np.array([[x, y, 0.7 * patch.reach_px]]) if patch.kind == "debris" else placed[:0]
        gap = np.hypot(own[:, None, 0] - placed[:, 0], own[:, None, 1] - placed[:, 1])
        return bool((gap > 1.1 * (own[:, None, 2] + placed[:, 2])).all())

    def _paste(self, patch: CellPatch, x: float, y: float) -> None:
        height, width = patch.transmittance.shape[:2]
        left, top = round(x - width / 2), round(y - height / 2)
        rows = slice(max(0, top), min(self.size_px, top + height))
        columns = slice(max(0, left), min(self.size_px, left + width))
        light = patch.transmittance[
            rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
        ]
        view = self.pixels[rows, columns]
        view[:] = cv2.multiply(view, np.ascontiguousarray(light), scale=1 / 255)
        for nucleus_x, nucleus_y, radius_px in patch.nuclei_px.tolist():
            x_level0, y_level0 = nucleus_x + left, nucleus_y + top
            if 0 <= x_level0 < self.size_px and 0 <= y_level0 < self.size_px:
                self.nuclei.append((x_level0, y_level0, radius_px, patch.kind))
        if patch.kind == "abnormal":
            box_x, box_y, box_width, box_height = patch.box_px
            self.boxes.append((left + box_x, top + box_y, box_width, box_height))


def _glass(rng: np.random.Generator, stain: Stain, size_px: int) -> NDArray[np.uint8]:
    """Clear glass under uneven light, uint8 (size, size, 3)."""
    light = smooth_noise(rng, 48, 48, 16.0) * np.float32(0.008)
    axis = np.linspace(-1, 1, 48, dtype=np.float32)
    light = 1 + light - np.float32(rng.uniform(0, 0.02)) * (axis[:, None] ** 2 + axis[None] ** 2)
    small = light[..., None] * stain.background_rgb
    small = small + np.float32(0.6) * rng.standard_normal((48, 48, 3), dtype=np.float32)
    small = np.clip(np.round(small), 0, 255).astype(np.uint8)
    glass = cv2.resize(small, (size_px, size_px), interpolation=cv2.INTER_LINEAR)
    return np.asarray(glass, np.uint8)
