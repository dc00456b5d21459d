"""Kept tiles of chunks on a node's own disk, so that later epochs need not read the slides.

<folder>/<key>/<xx>/<chunk>.arrow   one shard a chunk: Arrow tensors, mapped when read

What is kept is what a slide says of a chunk, before anything random: pixels and nuclei. Pixels are
not compressed: a tile of cell images shrinks by a third at best and takes longer to unpack than a
local disk takes to deliver it. An epoch visits every chunk once in an order of its own, so a shard
is worth the same as any other: those that came first stay, and what finds no room is read from its
slide again. Shards of other runs go first when room is needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cytoray.errors import InputError
from cytoray.slides.remote.default import cache_folder
from cytoray.slides.remote.locks import exclusive, lock_folder

GB = 10**9
# Room that other files of the node need (checkpoints, staged slides).
KEEP_FREE_BYTES = 2 * GB

logger = logging.getLogger(__name__)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PARTS = 256


class CachedChunk(NamedTuple):
    """What a slide says of a chunk: `pixels` uint8 (n, S, S, 3), read-only, of the kept tiles in
    the order of their indices; `nuclei` float32 (N, 4): x_level0, y_level0, radius_um, score."""

    pixels: np.ndarray
    nuclei: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TileCacheConfig:
    """A cache as every reader of a node opens it.

    Attributes:
        max_gb: what the shards of a node may take up together, 10^9 bytes.
        key: names the data; see `cache_key`.
        folder: empty: below the cache folder of the node (CYTORAY_CACHE_DIR).
        keep_free_bytes: left free on the disk whatever `max_gb` says.
    """

    max_gb: float
    key: str
    folder: str = ""
    keep_free_bytes: int = KEEP_FREE_BYTES


def cache_key(*facts: object) -> str:
    """A name for data that hang on `facts`; another one after the machine was started anew.

    Shards are not forced to the disk when they are written: what a power cut may have left half
    written is never looked at again.
    """
    boot = _BOOT_ID.read_text() if _BOOT_ID.exists() else ""
    return hashlib.blake2b(repr((facts, boot)).encode(), digest_size=12).hexdigest()


class TileCache:
    """The shards of one run on this node, shared by all of its readers.

    Raises:
        InputError: the folder cannot be made or written.
    """

    def __init__(self, config: TileCacheConfig) -> None:
        self._config = config
        self._root = Path(config.folder) if config.folder else cache_folder() / "tiles"
        self._folder = self._root / config.key
        self._full = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Held as long as this process lives: nobody takes our shards away.
            self._held = lock_folder(self._folder, fcntl.LOCK_SH)
            with exclusive(self._root / ".lock"):
                self._remove_drafts()
                self._note_bytes(_bytes_below(self._root))
        except OSError as error:
            raise InputError(
                f"the tile cache {self._root} cannot be used: {error}; set CYTORAY_CACHE_DIR to a "
                "folder on a local disk, or leave --cache-tiles out"
            ) from error

    def get(self, chunk: int) -> CachedChunk | None:
        """The shard of a chunk; None when there is none that is whole."""
        path = self._path(chunk)
        try:
            with pa.memory_map(str(path)) as source:
                pixels, nuclei = (pa.ipc.read_tensor(source).to_numpy() for _ in range(2))
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, ValueError):
            path.unlink(missing_ok=True)
            return None
        return CachedChunk(pixels, nuclei)

    def put(self, chunk: int, pixels: np.ndarray, nuclei: np.ndarray) -> None:
        """Keep a chunk if there is room. Never raises on I/O: the cache is a help, not a need.

        Args:
            chunk: its number in the plan.
            pixels: uint8 (n, S, S, 3).
            nuclei: float32 (N, 4).
        """
        size = pixels.nbytes + nuclei.nbytes
        path = self._path(chunk)
        if self._full or path.exists():
            return
        draft = path.with_name(f".{chunk}.{os.getpid()}.part")
        try:
            if not self._reserve(size):
                self._stop(f"its {self._config.max_gb:g} GB are used, or the disk is nearly full")
                return
            path.parent.mkdir(exist_ok=True)
            with pa.OSFile(str(draft), "wb") as sink:
                for values in (pixels, nuclei):
                    pa.ipc.write_tensor(pa.Tensor.from_numpy(np.ascontiguousarray(values)), sink)
            os.replace(draft, path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            self._stop(str(error))

    def _stop(self, why: str) -> None:
        """Write no more; what is there is still read."""
        self._full = True
        logger.warning("tile cache %s takes no more: %s", self._root, why)

    def _path(self, chunk: int) -> Path:
        return self._folder / f"{chunk % _PARTS:02x}" / f"{chunk}.arrow"

    def _reserve(self, size: int) -> bool:
        """Book room for a shard, if need be that of runs that nobody works on any more."""
        with exclusive(self._root / ".lock"):
            if self._fits(size):
                return True
            for other in self._others():
                _remove_unused(other)
                self._note_bytes(_bytes_below(self._root))
                if self._fits(size):
                    return True
            return False

    def _fits(self, size: int) -> bool:
        total = int((self._root / ".bytes").read_text() or 0) + size
        free = shutil.disk_usage(self._root).free - size
        if total > self._config.max_gb * GB or free < self._config.keep_free_bytes:
            return False
        self._note_bytes(total)
        return True

    def _note_bytes(self, total: int) -> None:
        (self._root / ".bytes").write_text(str(total))

    def _others(self) -> list[Path]:
        """Folders of other runs, oldest first."""
        found = [p for p in self._root.iterdir() if p.is_dir() and p != self._folder]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)

    def _remove_drafts(self) -> None:
        """Drafts of processes that were killed while writing."""
        for draft in self._folder.glob("*/.*.part"):
            if not Path("/proc", draft.name.split(".")[2]).exists():
                draft.unlink(missing_ok=True)


def _remove_unused(folder: Path) -> None:
    """Remove the shards of another run, unless a process has them open."""
    try:
        lock = lock_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _bytes_below(root: Path) -> int:
    return sum(_sizes(root))


def _sizes(root: Path) -> Iterator[int]:
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(FileNotFoundError):
                yield os.stat(os.path.join(folder, name)).st_size
