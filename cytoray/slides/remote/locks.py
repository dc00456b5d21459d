"""Locks of processes on folders, gone with the process that holds them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of a file, made when missing; one process at a time."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def lock_folder(folder: Path, operation: int) -> int | None:
    """Open and flock a folder; None when there is none (any more).

    Raises:
        BlockingIOError: with LOCK_NB, when somebody else has it.
    """
    while True:
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock, operation)
            if os.path.samestat(os.stat(folder), os.fstat(lock)):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # it was removed, and perhaps made anew, while we waited
