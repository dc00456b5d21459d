"""Make real bad slides, so that readers and quarantine are tested on files and not on stand-ins.

Each helper writes `out` (parents are made) and returns it. What OpenSlide makes of each file is
stated in its docstring and held by a test.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import tifffile

from cytoray.errors import InputError
from cytoray.synthetic.files import write_pyramid
from cytoray.synthetic.scene import Scene
from cytoray.synthetic.slides import add_cells
from cytoray.synthetic.stain import sample_stain

SCALE_TEXT = re.compile(rb"\|?\s*(AppMag|MPP)\s*=\s*[0-9.]+")


def truncate(path: Path | str, out: Path | str, fraction: float = 0.5) -> Path:
    """Keep only the first `fraction` of the file's bytes, like an upload that broke off.

    OpenSlide refuses to open it: the TIFF directory chain, or the tiles of the smallest level that
    it hashes, run past the end of the file.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction must be between 0 and 1, not {fraction}")
    content = Path(path).read_bytes()
    return _write_bytes(out, content[: max(1, int(len(content) * fraction))])


def zero_bytes(out: Path | str) -> Path:
    """Write an empty file. OpenSlide does not recognise it."""
    return _write_bytes(out, b"")


def not_a_slide(out: Path | str) -> Path:
    """Write a text file under a slide's name. OpenSlide does not recognise it."""
    return _write_bytes(
        out, b"slide_id,label\nthis is a spreadsheet saved under a wrong name,0\n" * 64
    )


def corrupt_tile(path: Path | str, out: Path | str, tile_index: int) -> Path:
    """Copy a good slide with the JPEG bytes of one level-0 tile overwritten.

    OpenSlide opens it and reads every region that does not touch the tile; a read that does raises
    `OpenSlideError`, and that handle raises ever after (open the slide afresh to go on).

    Args:
        path: a tiled TIFF or SVS.
        out: the damaged copy.
        tile_index: which tile of level 0, row by row from the top left.
    """
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offsets, sizes = page.dataoffsets, page.databytecounts
    if not 0 <= tile_index < len(offsets):
        raise InputError(f"{path} has tiles 0 to {len(offsets) - 1}; there is no tile {tile_index}")
    target = _copy(path, out)
    with target.open("r+b") as stream:
        stream.seek(offsets[tile_index])
        stream.write(b"\x00" * sizes[tile_index])
    return target


def strip_mpp(path: Path | str, out: Path | str) -> Path:
    """Copy a slide without any statement of its scale: no MPP, no AppMag, no resolution unit.

    OpenSlide opens it, with neither `openslide.mpp-x` nor `openslide.objective-power`.
    """
    target = _copy(path, out)
    with tifffile.TiffFile(target, mode="r+") as tiff:
        for page in list(tiff.pages):
            tags = page.aspage().tags
            if "ImageDescription" in tags:
                tag = tags["ImageDescription"]
                text = tag.value.encode("ascii", "replace")
                tag.overwrite(SCALE_TEXT.sub(lambda m: b" " * len(m[0]), text).decode("ascii"))
            if "ResolutionUnit" in tags:
                tags["ResolutionUnit"].overwrite(1)
            for name in ("XResolution", "YResolution"):
                if name in tags:
                    tags[name].overwrite((1, 1))
    return target


def blank_slide(
    out: Path | str,
    *,
    size_px: int = 1024,
    mpp: float = 0.25,
    layout: str = "aperio",
    seed: int = 0,
) -> Path:
    """Write a good slide of clear glass with camera noise: nothing on it is foreground."""
    return _write_scene(out, size_px, mpp, layout, seed, num_cells=0)


def anucleate_slide(
    out: Path | str,
    *,
    size_px: int = 1024,
    mpp: float = 0.25,
    layout: str = "aperio",
    seed: int = 0,
) -> Path:
    """Write a good slide of squamous cytoplasm without a single nucleus."""
    num_cells = max(6, round(250 * (size_px * mpp / 1000) ** 2))
    return _write_scene(out, size_px, mpp, layout, seed, num_cells=num_cells)


def _write_scene(
    out: Path | str, size_px: int, mpp: float, layout: str, seed: int, num_cells: int
) -> Path:
    rng = np.random.default_rng([seed, 4])
    stain = sample_stain(rng, np.random.default_rng([seed, 3, 0]))
    scene = Scene(rng, stain, size_px, mpp)
    add_cells(scene, rng, stain, num_cells, 0, with_nucleus=False)
    return write_pyramid(out, scene.finish(), mpp=mpp, layout=layout)


def _copy(path: Path | str, out: Path | str) -> Path:
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(path, target))


def _write_bytes(out: Path | str, content: bytes) -> Path:
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return target
