"""Drawn nuclei with exact truth."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import pytest

GLASS = (236, 234, 238)
PINK_CYTOPLASM = (232, 170, 190)
NUCLEUS = (90, 65, 140)


class Field:
    """An image in micrometres: `disc` draws, `pixels` renders.

    Args:
        size_um: side of the field.
        mpp: um per pixel.
        glass: colour of the background.
        noise: standard deviation of the grain, grey levels.
    """

    def __init__(
        self, size_um: float, mpp: float, glass: Sequence[float] = GLASS, noise: float = 1.0
    ) -> None:
        self.mpp = mpp
        self.noise = noise
        side = round(size_um / mpp)
        self._canvas = np.empty((side, side, 3), np.float32)
        self._canvas[:] = glass

    def disc(
        self, x_um: float, y_um: float, radius_um: float, colour: Sequence[float] = NUCLEUS
    ) -> Field:
        """Draw a disc with an antialiased edge."""
        left, top = (max(int((um - radius_um) / self.mpp) - 2, 0) for um in (x_um, y_um))
        right, bottom = (int((um + radius_um) / self.mpp) + 3 for um in (x_um, y_um))
        view = self._canvas[top:bottom, left:right]
        y, x = np.mgrid[top : top + view.shape[0], left : left + view.shape[1]]
        distance_um = np.hypot((x + 0.5) * self.mpp - x_um, (y + 0.5) * self.mpp - y_um)
        cover = np.clip((radius_um - distance_um) / self.mpp + 0.5, 0, 1)[..., None]
        view[:] = view * (1 - cover) + np.asarray(colour, np.float32) * cover
        return self

    def pixels(self) -> np.ndarray:
        """uint8 (h, w, 3), slightly blurred and noisy like a scan."""
        blurred = cv2.GaussianBlur(self._canvas, (0, 0), max(0.25 / self.mpp, 0.3))
        grain = np.random.default_rng(0).normal(0, self.noise, self._canvas.shape)
        return np.clip(np.rint(blurred + grain), 0, 255).astype(np.uint8)

    def to_px(self, um: float) -> float:
        """Micrometres from the corner as a pixel index (0 is the centre of the first pixel)."""
        return um / self.mpp - 0.5


@pytest.fixture
def field() -> type[Field]:
    return Field
