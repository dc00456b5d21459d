"""Files that are either whole or absent: everything the package writes goes through here."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it takes the name `path` on success.

    The file is fsynced, then renamed with `os.replace`, so that a reader (or a resumed run) sees
    either the old file or the whole new one. On an exception the temporary file is removed and
    `path` is untouched. Missing parent folders are made. The temporary name starts with a dot and
    keeps the suffix of `path`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.stem}.{secrets.token_hex(6)}.tmp{target.suffix}"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(target.parent)


def _fsync_folder(folder: Path) -> None:
    """Make the rename itself durable where the file system lets a folder be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` so that the file is never seen half written."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path` so that the file is never seen half written."""
    atomic_write_bytes(path, text.encode("utf-8"))


def write_parquet_atomic(
    table: pa.Table, path: str | os.PathLike[str], *, compression: str = "zstd"
) -> None:
    """Write `table` as one Parquet file at `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression=compression)
