"""Write synthetic slides as pyramidal tiled-JPEG TIFF files, with their truth beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import tifffile
from numpy.typing import NDArray

from cytoray.errors import choose
from cytoray.synthetic.config import SynthConfig
from cytoray.synthetic.slides import NUCLEI_SCHEMA, SyntheticSlide

TILE_PX = 256
SMALLEST_LEVEL_PX = 768
LAYOUTS = ("aperio", "generic")


@dataclass(frozen=True, kw_only=True)
class SlideTruth:
    """What is on one synthetic slide.

    Attributes:
        slide_id: as in the manifest.
        label: 1 when there are abnormal cells.
        size_px: side at level 0.
        mpp: um per pixel at level 0.
        nuclei: as `SyntheticSlide.nuclei`.
        abnormal_boxes_level0: int32 (N, 4), x, y, w, h.
    """

    slide_id: str
    label: int
    size_px: int
    mpp: float
    nuclei: pa.Table
    abnormal_boxes_level0: NDArray[np.int32]


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_pyramid(
    path: Path | str,
    pixels: NDArray[np.uint8],
    *,
    mpp: float,
    layout: str = "aperio",
    jpeg_quality: int = 85,
) -> Path:
    """Write pixels as a pyramid that OpenSlide opens: 256 px JPEG tiles, each level half the last.

    Args:
        path: the file; `.svs` is usual for `aperio`, `.tiff` for `generic`.
        pixels: uint8 (h, w, 3), level 0.
        mpp: um per pixel at level 0.
        layout: `aperio` says mpp and objective in ImageDescription; `generic` in resolution tags.
        jpeg_quality: 1 to 100.
    """
    choose("slide layout", layout, LAYOUTS)
    levels = _halved(pixels)

    def write(target: Path) -> None:
        with tifffile.TiffWriter(target) as tiff:
            for number, level in enumerate(levels):
                tiff.write(
                    level,
                    photometric="rgb",
                    tile=(TILE_PX, TILE_PX),
                    compression="jpeg",
                    compressionargs={"level": jpeg_quality},
                    subfiletype=1 if number else 0,
                    description=_aperio_text(level, mpp) if layout == "aperio" else None,
                    resolution=(1e4 / mpp / 2**number, 1e4 / mpp / 2**number),
                    resolutionunit="CENTIMETER",
                    metadata=None,
                    software="cytoray synth",
                    maxworkers=1,
                )

    return write_atomically(Path(path), write)


def _halved(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return the pixels at level 0, 1, 2 and so on, until they are small."""
    levels = [pixels]
    while max(levels[-1].shape[:2]) > SMALLEST_LEVEL_PX:
        height, width = levels[-1].shape[:2]
        half = cv2.resize(levels[-1], (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        levels.append(np.asarray(half, np.uint8))
    return levels


def _aperio_text(level: NDArray[np.uint8], mpp: float) -> str:
    height, width = level.shape[:2]
    return (
        f"Aperio Image Library (cytoray synth)\n{width}x{height} ({TILE_PX}x{TILE_PX}) JPEG/RGB"
        f"|AppMag = {10 / mpp:g}|MPP = {mpp:g}"
    )


def write_slide(slide: SyntheticSlide, config: SynthConfig, out_dir: Path | str) -> Path:
    """Write one slide and, last, its truth; a slide is finished once the truth is there.

    Returns:
        The slide file, `out_dir / slide.plan.path`.
    """
    root = Path(out_dir)
    path = write_pyramid(
        root / slide.plan.path,
        slide.pixels,
        mpp=config.mpp,
        layout=slide.plan.layout,
        jpeg_quality=config.jpeg_quality,
    )
    nuclei = {
        name: [round(v, 3) for v in values] if isinstance(values[0], float) else values
        for name, values in slide.nuclei.to_pydict().items()
        if values
    }
    truth = {
        "slide_id": slide.plan.slide_id,
        "label": slide.plan.label,
        "size_px": config.size_px,
        "mpp": config.mpp,
        "nuclei": nuclei,
        "abnormal_boxes_level0": slide.abnormal_boxes_level0.tolist(),
    }
    write_atomically(root / slide.plan.truth_path, lambda file: file.write_text(json.dumps(truth)))
    return path


def read_truth(path: Path | str) -> SlideTruth:
    """Read a truth file written by `write_slide`."""
    content = json.loads(Path(path).read_text())
    columns = {name: content["nuclei"].get(name, []) for name in NUCLEI_SCHEMA.names}
    boxes = np.array(content["abnormal_boxes_level0"], np.int32).reshape(-1, 4)
    return SlideTruth(
        slide_id=content["slide_id"],
        label=content["label"],
        size_px=content["size_px"],
        mpp=content["mpp"],
        nuclei=pa.table(columns, schema=NUCLEI_SCHEMA),
        abnormal_boxes_level0=boxes,
    )
