"""The cache a process uses unless it is given another, from the environment."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from cytoray.errors import InputError
from cytoray.slides.remote.cache import GB, SlideCache
from cytoray.slides.remote.urls import is_remote

DEFAULT_CACHE_GB = 100.0


def stage(path: str) -> AbstractContextManager[object]:
    """Bring a slide to this node ahead of `open_slide`, and keep it here inside the `with`.

    A download may take long; this keeps it out of what is timed. Nothing is done to a local path.

    Raises:
        SlideError, InputError: see `SlideCache.stage`.
    """
    return default_cache().stage(path) if is_remote(path) else nullcontext()


def default_cache() -> SlideCache:
    """This process's cache, as CYTORAY_CACHE_DIR and CYTORAY_CACHE_GB say.

    Without them: a folder of the user under the system's temporary folder, and 100 GB or half of
    the free disk, whichever is less.

    Raises:
        InputError: a bad setting, or a folder that cannot be used.
    """
    return _cache(os.environ.get("CYTORAY_CACHE_DIR", ""), os.environ.get("CYTORAY_CACHE_GB", ""))


def cache_folder() -> Path:
    """Where this node keeps what can be had again: CYTORAY_CACHE_DIR, or a temporary folder.

    Raises:
        InputError: the temporary folder belongs to somebody else.
    """
    return _folder(os.environ.get("CYTORAY_CACHE_DIR", ""))


def _folder(named: str) -> Path:
    place = Path(named or Path(tempfile.gettempdir()) / f"cytoray-cache-{os.getuid()}")
    if not named and place.exists() and place.stat().st_uid != os.getuid():
        raise InputError(f"{place} belongs to another user; set CYTORAY_CACHE_DIR to a folder")
    return place


@functools.lru_cache(maxsize=4)
def _cache(folder: str, size_gb: str) -> SlideCache:
    cache = SlideCache(_folder(folder), 0)
    cached = sum(entry.size_bytes for entry in cache.entries())
    cache.max_bytes = _max_bytes(size_gb, shutil.disk_usage(cache.folder).free + cached)
    return cache


def _max_bytes(size_gb: str, available_bytes: int) -> int:
    if not size_gb:
        return min(round(DEFAULT_CACHE_GB * GB), available_bytes // 2)
    try:
        max_bytes = round(float(size_gb) * GB)
    except (ValueError, OverflowError):
        max_bytes = 0
    if max_bytes <= 0:
        raise InputError(f"CYTORAY_CACHE_GB must be a number above 0, not {size_gb!r}")
    return max_bytes
