"""Small tiled TIFF slides made on the spot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

SlideMaker = Callable[..., Path]


def cell_picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3): pale round cells with nuclei on a slightly tinted noisy field."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), (232, 234, 238), np.float32)
    for _ in range(max(3, width * height // 90_000)):
        x, y = rng.integers(0, width), rng.integers(0, height)
        radius = int(rng.integers(40, 90))
        colour = [int(value) for value in rng.integers((150, 160, 180), (210, 200, 230))]
        cv2.circle(picture, (int(x), int(y)), radius, colour, -1)
        cv2.circle(picture, (int(x), int(y)), radius // 4, (80, 60, 130), -1)
    picture += rng.normal(0, 2, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def write_slide(
    path: Path,
    pixels: np.ndarray,
    *,
    mpp: float | None = 0.25,
    levels: int = 3,
    tile: int = 256,
    compression: str = "jpeg",
    photometric: str = "ycbcr",
    description: str | None = None,
    quality: int = 90,
) -> Path:
    """Write a pyramidal tiled TIFF of `pixels`, each level half the one before.

    An odd last row or column is dropped before halving, as scanners do.
    """
    resolution = None if mpp is None else (1e4 / mpp, 1e4 / mpp)
    arguments = {"level": quality} if compression == "jpeg" else None
    with tifffile.TiffWriter(path) as writer:
        for level in range(levels):
            image = pixels
            if level:
                width, height = pixels.shape[1] >> level, pixels.shape[0] >> level
                image = pixels[: height << level, : width << level]
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            writer.write(
                image,
                tile=(tile, tile),
                photometric=photometric,
                compression=compression,
                subfiletype=1 if level else 0,
                resolution=resolution,
                resolutionunit="CENTIMETER" if mpp is not None else None,
                description=description,
                metadata=None,
                compressionargs=arguments,
            )
    return path


def damage_tile(path: Path, tile_index: int, page: int = 0, start: float = 0.0) -> None:
    """Overwrite one tile of a TIFF with zeros, from the fraction `start` of it on."""
    with tifffile.TiffFile(path) as tiff:
        directory = tiff.pages[page]
        offset, size = directory.dataoffsets[tile_index], directory.databytecounts[tile_index]
    skip = int(size * start)
    with open(path, "r+b") as file:
        file.seek(offset + skip)
        file.write(bytes(size - skip))


@pytest.fixture
def make_slide(tmp_path: Path) -> SlideMaker:
    """make_slide(name="a.tiff", width=1500, height=1200, pixels=None, **write_slide options)."""

    def make(
        name: str = "a.tiff",
        width: int = 1500,
        height: int = 1200,
        pixels: np.ndarray | None = None,
        **options,
    ) -> Path:
        if pixels is None:
            pixels = cell_picture(width, height)
        return write_slide(tmp_path / name, pixels, **options)

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real slides."""
    folder = os.environ.get("CYTORAY_REAL_DATA")
    if not folder:
        pytest.skip("CYTORAY_REAL_DATA is not set")
    return Path(folder)
