"""The node's cache of remote slides: bounded, shared by all processes, safe against kills.

An entry is a folder `<version>-<bytes>`, which reserves that many bytes from the moment it is made.
It is locked (flock on the folder itself, gone with the process that holds it) exclusively while it
is filled and shared while a reader has the slide open. The slide's own file takes its name last,
so an entry that has it is whole. Whoever needs room removes the entries longest not opened, and
only those it can lock exclusively.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from cytoray.errors import InputError, SlideError
from cytoray.slides.remote.download import disk_problem, fetch
from cytoray.slides.remote.locks import exclusive, lock_folder
from cytoray.slides.remote.lookup import RemoteSlide, remote_slide
from cytoray.slides.remote.retry import DownloadPolicy
from cytoray.slides.remote.urls import redact

GB = 10**9
WAIT_FOR_ROOM_S = 600.0
CHANGES_TOLERATED = 3
_ENTRY = re.compile(r"[0-9a-f]{32}-(\d+)")
_TRASH = ".trash-"


class ChangedError(Exception):
    """The object was replaced while it was downloaded."""


@dataclass(frozen=True)
class Entry:
    """A folder of the cache: the bytes it reserves, and when a slide of it was last opened."""

    folder: Path
    size_bytes: int
    used_ns: int


class StagedSlide:
    """A slide in the cache that stays there until it is released.

    Attributes:
        path: the local file.
    """

    def __init__(self, path: Path, lock: int, cache: SlideCache) -> None:
        self.path = str(path)
        cache.held += 1
        self._release = weakref.finalize(self, cache.let_go, lock)

    def release(self) -> None:
        """Let the cache remove the file when it needs room."""
        self._release()

    def __enter__(self) -> StagedSlide:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class SlideCache:
    """A folder on a disk of this node, shared by all of its processes.

    Args:
        folder: made when missing; on a local disk (file locks must work).
        max_bytes: what its slides may take up together.
        policy: see `DownloadPolicy`.
        wait_s: how long to wait for room when all that is there is open.

    Raises:
        InputError: the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_bytes: int,
        *,
        policy: DownloadPolicy | None = None,
        wait_s: float = WAIT_FOR_ROOM_S,
    ) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.policy = policy or DownloadPolicy()
        self.wait_s = wait_s
        self.held = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._room():
                pass
        except OSError as error:
            raise InputError(
                f"the slide cache {self.folder} cannot be used: {error}; set CYTORAY_CACHE_DIR to "
                "a folder on a local disk"
            ) from error

    def stage(self, url: str) -> StagedSlide:
        """Bring a slide to this node, or find it here; release it when it is no longer read.

        Raises:
            SlideError: see `remote_slide` and `fetch`; `cache_too_small` when the slide is larger
                than the whole cache, `cache_busy` when all the room is taken by slides that are
                open (at once if this process holds some of them: two that wait for each other
                would wait for ever), `changed_while_reading`.
            InputError: unknown protocol, or a package is missing.
        """
        for attempt in range(CHANGES_TOLERATED):
            slide = remote_slide(url, fresh=attempt > 0, policy=self.policy)
            try:
                return self._stage(slide)
            except ChangedError:
                continue
            except SlideError as error:
                broken = error.code in ("download_failed", "checksum_mismatch")
                if not broken or not self._is_replaced(slide):
                    raise
            except OSError as error:
                raise disk_problem(error, self.folder) from error
        raise SlideError(
            "changed_while_reading",
            f"{redact(url)} was replaced {CHANGES_TOLERATED} times while it was downloaded",
        )

    def _stage(self, slide: RemoteSlide) -> StagedSlide:
        folder = self.folder / f"{slide.version}-{slide.size_bytes}"
        target = folder / slide.files[0].name
        while True:
            lock = lock_folder(folder, fcntl.LOCK_SH)
            if lock is not None and not target.exists():
                os.close(lock)
                lock = self._fill(slide, folder, target)
            if lock is None:
                self._reserve(slide, folder)
            elif target.exists():
                now_ns = time.time_ns()  # finer than the clock of the file system
                os.utime(folder, ns=(now_ns, now_ns))
                return StagedSlide(target, lock, self)
            else:
                os.close(lock)

    def let_go(self, lock: int) -> None:
        """Give back the lock of a `StagedSlide`."""
        self.held -= 1
        os.close(lock)

    def _fill(self, slide: RemoteSlide, folder: Path, target: Path) -> int | None:
        """Download under an exclusive lock; returns it turned into a shared one.

        None when the entry was removed meanwhile. Another process may have filled it.
        """
        lock = lock_folder(folder, fcntl.LOCK_EX)
        if lock is None:
            return None
        try:
            if not target.exists():
                self._download(slide, folder)
            fcntl.flock(lock, fcntl.LOCK_SH)
            return lock
        except BaseException:
            os.close(lock)
            raise

    def _download(self, slide: RemoteSlide, folder: Path) -> None:
        """Fetch all files, then give them their names, the slide's own file last."""
        try:
            for file in slide.files:
                fetch(file, _partial(folder, file.name), self.policy)
            if self._is_replaced(slide):
                raise ChangedError
            for file in reversed(slide.files):
                os.replace(_partial(folder, file.name), folder / file.name)
        except (SlideError, ChangedError) as error:
            resumable = isinstance(error, SlideError) and error.code == "download_failed"
            if not resumable:
                self._remove(folder)
            raise
        except OSError:
            self._remove(folder)
            raise

    def _is_replaced(self, slide: RemoteSlide) -> bool:
        """Whether the store holds another version by now; this process goes on with that one."""
        return remote_slide(slide.url, fresh=True, policy=self.policy).version != slide.version

    def _reserve(self, slide: RemoteSlide, folder: Path) -> None:
        """Make the entry once there is room for it."""
        if slide.size_bytes > self.max_bytes:
            raise SlideError(
                "cache_too_small",
                f"{redact(slide.url)} has {_gb(slide.size_bytes)}, the whole slide cache "
                f"{self.folder} may take up {_gb(self.max_bytes)}; raise CYTORAY_CACHE_GB",
            )
        end = time.monotonic() + self.wait_s
        while True:
            with self._room():
                if folder.exists():
                    return
                over_bytes, short_bytes = self._make_room(slide.size_bytes)
                if over_bytes <= 0 and short_bytes <= 0:
                    folder.mkdir(mode=0o700)
                    return
                in_vain = time.monotonic() > end or not any(self.entries())
            if over_bytes <= 0 and in_vain:
                raise self._disk_full(slide, short_bytes)
            if self.held or in_vain:
                raise self._busy(slide, over_bytes)
            time.sleep(random.uniform(0.2, 1.0))

    def _disk_full(self, slide: RemoteSlide, short_bytes: int) -> SlideError:
        left = _gb(slide.size_bytes - short_bytes)
        return SlideError(
            "disk_full",
            f"{redact(slide.url)} has {_gb(slide.size_bytes)}, the disk of the slide cache "
            f"{self.folder} has {left} left; free some, or set CYTORAY_CACHE_DIR to a larger disk",
        )

    def _busy(self, slide: RemoteSlide, over_bytes: int) -> SlideError:
        left = _gb(min(slide.size_bytes, max(0, slide.size_bytes - over_bytes)))
        return SlideError(
            "cache_busy",
            f"{redact(slide.url)} has {_gb(slide.size_bytes)}; only {left} of the "
            f"{_gb(self.max_bytes)} of the slide cache {self.folder} can be had, the rest is taken "
            "by slides that are open; raise CYTORAY_CACHE_GB or use fewer readers",
        )

    def _make_room(self, size_bytes: int) -> tuple[int, int]:
        """Remove entries, longest unused first, until `size_bytes` more fit.

        Returns:
            Bytes by which the cache would be over its bound, and by which the disk is too small;
            neither above 0 when there is room.
        """
        for trash in self.folder.glob(f"{_TRASH}*"):
            shutil.rmtree(trash, ignore_errors=True)
        entries = sorted(self.entries(), key=lambda entry: entry.used_ns)
        over_bytes = sum(entry.size_bytes for entry in entries) + size_bytes - self.max_bytes
        short_bytes = size_bytes - shutil.disk_usage(self.folder).free
        for entry in entries:
            if over_bytes <= 0 and short_bytes <= 0:
                break
            if self._evict(entry.folder):
                over_bytes -= entry.size_bytes
                short_bytes = size_bytes - shutil.disk_usage(self.folder).free
        return over_bytes, short_bytes

    def entries(self) -> Iterator[Entry]:
        """What is in the cache, whole or in the making."""
        with os.scandir(self.folder) as found:
            for item in found:
                match = _ENTRY.fullmatch(item.name)
                if match:
                    with suppress(FileNotFoundError):
                        yield Entry(
                            Path(item.path),
                            int(match[1]),
                            item.stat(follow_symlinks=False).st_mtime_ns,
                        )

    def _evict(self, folder: Path) -> bool:
        """Remove an entry unless somebody has it open or is filling it."""
        try:
            lock = lock_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use
            return False
        if lock is None:
            return True
        try:
            return self._remove(folder)
        finally:
            os.close(lock)

    def _remove(self, folder: Path) -> bool:
        """Take an entry out of sight at once, then delete it; the caller holds its lock."""
        trash = self.folder / f"{_TRASH}{secrets.token_hex(8)}"
        try:
            os.rename(folder, trash)
        except OSError:
            return False
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def _room(self) -> AbstractContextManager[None]:
        """One process at a time counts bytes and makes room."""
        return exclusive(self.folder / ".room")


def _partial(folder: Path, name: str) -> Path:
    return folder / f"{name}.part"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / GB:.3g} GB"
