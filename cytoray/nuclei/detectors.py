"""The detectors by name. A new one is a file with such a callable and an entry in `DETECTORS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from cytoray.errors import InputError, choose
from cytoray.nuclei.cellpose import CellposeDetector
from cytoray.nuclei.classical import ClassicalConfig, ClassicalDetector
from cytoray.nuclei.precomputed import PrecomputedNuclei
from cytoray.nuclei.small import SmallConfig, SmallDetector


class Detector(Protocol):
    """What every detector is.

    Attributes:
        name: the name it has in `DETECTORS`, written to the nuclei table.
    """

    name: str

    def __call__(self, pixels: np.ndarray, mpp: float) -> np.ndarray:
        """Nuclei of one image.

        Args:
            pixels: uint8 (h, w, 3), RGB.
            mpp: um per pixel of `pixels`.

        Returns:
            float32 (N, 4): x_px, y_px (0, 0 is the centre of the first pixel), radius_um, score.
        """
        ...


class NoDetector:
    """Finds nothing, so that every crop is a random one: the ablation without nuclei."""

    name = "none"

    def __call__(self, pixels: np.ndarray, mpp: float) -> np.ndarray:
        """An empty float32 (0, 4), whatever the image."""
        return np.zeros((0, 4), np.float32)


def build_classical(**options: Any) -> ClassicalDetector:
    """`ClassicalDetector` with the given fields of `ClassicalConfig`."""
    return ClassicalDetector(ClassicalConfig(**options))


def build_small(**options: Any) -> SmallDetector:
    """`SmallDetector` with the given fields of `SmallConfig`."""
    return SmallDetector(SmallConfig(**options))


DETECTORS: dict[str, Callable[..., Detector]] = {
    "classical": build_classical,
    "small": build_small,
    "cellpose": CellposeDetector,
    "none": NoDetector,
    "precomputed": PrecomputedNuclei,
}
_OPTIONS: dict[str, Callable[..., Any]] = {
    **DETECTORS,
    "classical": ClassicalConfig,
    "small": SmallConfig,
}


def build_detector(name: str, **options: Any) -> Detector:
    """Build the detector called `name`.

    Args:
        name: a key of `DETECTORS`.
        **options: for `classical` the fields of `ClassicalConfig`, for `small` those of
            `SmallConfig`, for `cellpose` the arguments of `CellposeDetector`.

    Raises:
        InputError: unknown name or option, or a value that is out of range.
    """
    choose("nuclei detector", name, DETECTORS)
    known = [p for p in inspect.signature(_OPTIONS[name]).parameters if p not in ("args", "kwargs")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(
            f"nuclei detector {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"valid: {', '.join(known) or 'none'}"
        )
    return DETECTORS[name](**options)
