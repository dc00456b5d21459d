"""A log of finished pieces: each record is whole or ignored, whatever killed the writer."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# Bytes of the JSON part, bytes of the data behind it, checksum of both.
_HEADER = struct.Struct("<III")


class Journal:
    """Records appended one by one, each some plain values and some bytes.

    A record cut short by a kill, or damaged, is dropped together with whatever follows it when
    the journal is opened again. A journal written for another `key` is started anew.

    Args:
        path: the file; its folder is made.
        key: what the records hang on (settings, the fingerprint of an input); plain values.
    """

    def __init__(self, path: str | os.PathLike[str], key: dict[str, Any]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole, end = [], 0
        if self.path.exists():
            with open(self.path, "rb") as file:
                for record in _read_records(file):
                    whole.append(record)
                    end = file.tell()
        # Through JSON, so that what was written equals what is compared with it.
        same = bool(whole) and whole[0][0] == json.loads(json.dumps(key))
        self.records: list[tuple[dict[str, Any], bytes]] = whole[1:] if same else []
        self._file = open(self.path, "r+b" if same else "wb")  # noqa: SIM115 - closed in close()
        if same:
            self._file.truncate(end)
            self._file.seek(end)
        else:
            self._write(key, b"")

    def append(self, values: dict[str, Any], data: bytes = b"") -> None:
        """Add a record; it is with the operating system when this returns."""
        self._write(values, data)
        self.records.append((values, data))

    def close(self) -> None:
        """Leave the journal for a later run."""
        self._file.close()

    def remove(self) -> None:
        """Delete the journal: what it stood for is finished."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _write(self, values: dict[str, Any], data: bytes) -> None:
        text = json.dumps(values).encode()
        checksum = zlib.crc32(data, zlib.crc32(text))
        self._file.write(_HEADER.pack(len(text), len(data), checksum) + text + data)
        self._file.flush()


def _read_records(file: BinaryIO) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Whole records from the start of `file`, up to the first that is not."""
    size = os.fstat(file.fileno()).st_size
    while True:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return
        text_bytes, data_bytes, checksum = _HEADER.unpack(header)
        if file.tell() + text_bytes + data_bytes > size:
            return
        text, data = file.read(text_bytes), file.read(data_bytes)
        if zlib.crc32(data, zlib.crc32(text)) != checksum:
            return
        yield json.loads(text), data
