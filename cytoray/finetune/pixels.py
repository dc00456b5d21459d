"""Cell images as one array of equal squares: decoded once, mapped into memory by every trial.

An image that cannot be read is quarantined and left out; it is never a blank square.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cytoray.errors import SlideError, choose
from cytoray.io import atomic_path, atomic_write_text

Bad = tuple[int, str, str]


def _squash(image: Image.Image, side_px: int) -> Image.Image:
    return image.resize((side_px, side_px), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, side_px: int) -> Image.Image:
    left, top = ((size - min(image.size)) / 2 for size in image.size)
    box = (left, top, left + min(image.size), top + min(image.size))
    return image.resize((side_px, side_px), Image.Resampling.BICUBIC, box=box)


def _pad(image: Image.Image, side_px: int) -> Image.Image:
    scale = side_px / max(image.size)
    width, height = (max(1, round(size * scale)) for size in image.size)
    small = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    left, top = (side_px - width) // 2, (side_px - height) // 2
    edges = ((top, side_px - height - top), (left, side_px - width - left), (0, 0))
    return Image.fromarray(np.pad(small, edges, mode="edge"))


# How an image that is not square becomes one: stretched, its middle, or its edges repeated.
FITS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "squash": _squash,
    "crop": _crop,
    "pad": _pad,
}


def read_image(path: str | Path, side_px: int, fit: str = "squash") -> np.ndarray:
    """One image as uint8 (side_px, side_px, 3), RGB.

    Raises:
        SlideError: it is missing, or not an image that can be decoded to its end.
    """
    if not os.path.isfile(path):
        raise SlideError("missing_file", f"no file at {path}")
    try:
        with Image.open(path) as opened:
            return np.asarray(FITS[fit](opened.convert("RGB"), side_px))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise SlideError("decode_error", f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class CellPixels:
    """All images of a data set at one size.

    Attributes:
        path: a `.npy` of uint8 (N, S, S, 3), rows in the order of the images.
        bad: row, reason code and message of each image that could not be read (its row is 0).
    """

    path: Path
    bad: tuple[Bad, ...]

    def open(self) -> np.ndarray:
        """The array, mapped read-only."""
        return np.load(self.path, mmap_mode="r")


def cached_pixels(
    paths: Sequence[str],
    side_px: int,
    folder: Path,
    *,
    fit: str = "squash",
    threads: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> CellPixels:
    """Decode images, or take what an earlier run has left of the very same files.

    Args:
        paths: N images.
        side_px: S.
        folder: of the cache.
        fit: a name of `FITS`.
        threads: that decode; 0: one a core.
        on_progress: called with images done and N.

    Raises:
        InputError: an unknown fit.
    """
    choose("fit", fit, FITS)
    key = _fingerprint(paths, side_px, fit)
    path, facts = folder / f"pixels-{side_px}-{key}.npy", folder / f"pixels-{side_px}-{key}.json"
    if path.is_file() and facts.is_file():
        bad = tuple(tuple(row) for row in json.loads(facts.read_text(encoding="utf-8")))
        return CellPixels(path, bad)  # type: ignore[arg-type]
    with atomic_path(path) as draft:
        shape = (len(paths), side_px, side_px, 3)
        out = np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=shape)
        bad = _decode_all(paths, out, fit, threads, on_progress)
        out.flush()
        atomic_write_text(facts, json.dumps(bad))
    return CellPixels(path, tuple(bad))


def _decode_all(
    paths: Sequence[str],
    out: np.ndarray,
    fit: str,
    threads: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[Bad]:
    def decode(row: int) -> Bad | None:
        try:
            out[row] = read_image(paths[row], out.shape[1], fit)
        except SlideError as error:
            return row, error.code, error.message
        return None

    bad: list[Bad] = []
    with ThreadPoolExecutor(max_workers=threads or os.cpu_count() or 1) as pool:
        for done, fault in enumerate(pool.map(decode, range(len(paths))), 1):
            if fault is not None:
                bad.append(fault)
            if on_progress is not None and (done % 200 == 0 or done == len(paths)):
                on_progress(done, len(paths))
    return bad


def _fingerprint(paths: Sequence[str], side_px: int, fit: str) -> str:
    """Changes when a file is added, replaced or written again."""
    digest = hashlib.blake2b(f"{side_px}|{fit}|".encode(), digest_size=8)
    for path in paths:
        try:
            stat = os.stat(path)
            seen = f"{path}|{stat.st_size}|{stat.st_mtime_ns};"
        except OSError:
            seen = f"{path}|missing;"
        digest.update(seen.encode())
    return digest.hexdigest()
