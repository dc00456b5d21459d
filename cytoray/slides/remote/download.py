"""Fetching the files of a slide: in blocks, resumed where it broke off, checked when whole."""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import re
import zlib
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from cytoray.errors import InputError, SlideError
from cytoray.slides.remote.lookup import RemoteFile
from cytoray.slides.remote.retry import Attempts, DownloadPolicy
from cytoray.slides.remote.urls import open_filesystem, redact

S3_CHECKSUMS = ("SHA256", "SHA1", "CRC64NVME", "CRC32C", "CRC32")


class Digest(Protocol):
    """What hashlib's objects do."""

    def update(self, data: bytes, /) -> Any: ...

    def digest(self) -> bytes: ...


class RunningCrc:
    """A checksum function `crc(data, previous) -> int` in the shape of hashlib's objects."""

    def __init__(self, crc: Callable[[bytes, int], int], size_bytes: int) -> None:
        self._crc, self._size_bytes, self._value = crc, size_bytes, 0

    def update(self, data: bytes, /) -> None:
        self._value = self._crc(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._size_bytes, "big")


def _awscrt(name: str, size_bytes: int) -> Digest:
    return RunningCrc(getattr(importlib.import_module("awscrt.checksums"), name), size_bytes)


# Best first. The last two need a package that comes with gcsfs, or `pip install awscrt`.
DIGESTS: dict[str, Callable[[], Digest]] = {
    "sha256": hashlib.sha256,
    "sha1": lambda: hashlib.sha1(usedforsecurity=False),
    "md5": lambda: hashlib.md5(usedforsecurity=False),
    "crc32": lambda: RunningCrc(zlib.crc32, 4),
    "crc64nvme": lambda: _awscrt("crc64nvme", 8),
    "crc32c": lambda: _awscrt("crc32c", 4),
}


class NoRangesError(Exception):
    """The server cannot begin in the middle of a file."""


def fetch(file: RemoteFile, partial: Path, policy: DownloadPolicy) -> None:
    """Download one file to `partial`, going on where an earlier download stopped.

    Returns once `partial` is whole and agrees with the checksum the store gives, if it gives one.

    Raises:
        SlideError: `missing_file`, `access_denied`, `download_failed`, `checksum_mismatch`,
            `disk_full`, `cache_unusable`.
        InputError: the file system's package is missing.
    """
    checksums = stated_checksums(file)
    for _ in range(policy.checksum_tries):
        _fetch_bytes(file, partial, policy)
        problem = checksum_problem(partial, checksums)
        if not problem:
            return
        partial.unlink()
    raise SlideError(
        "checksum_mismatch",
        f"{redact(file.url)}: {problem} after {policy.checksum_tries} downloads; copy it to the "
        "store again (where the store's ETags are no MD5 sums, set CYTORAY_ETAG_IS_MD5=0)",
    )


def _fetch_bytes(file: RemoteFile, partial: Path, policy: DownloadPolicy) -> None:
    """All bytes of the file, however many connections it takes."""
    attempts = Attempts(file.url, policy)
    from_start = False
    with _open_partial(partial) as out:
        if out.seek(0, os.SEEK_END) > file.size_bytes:
            out.truncate(0)
        while True:
            before = out.seek(0, os.SEEK_END)
            try:
                _copy(file, out, policy.block_bytes, from_start)
                attempts.succeeded()
                break
            except NoRangesError:
                from_start = True
            except (SlideError, InputError):
                raise
            except Exception as error:  # each file system has exceptions of its own
                attempts.failed(error, progressed=not from_start and out.tell() > before)
        try:
            os.fsync(out.fileno())
        except OSError as error:
            raise disk_problem(error, partial) from error


def _open_partial(partial: Path) -> BinaryIO:
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        return open(partial, "ab", buffering=0)
    except OSError as error:
        raise disk_problem(error, partial) from error


def _copy(file: RemoteFile, out: BinaryIO, block_bytes: int, from_start: bool) -> None:
    """Append what is missing; with `from_start` the body is read whole, as a plain server sends it.

    Raises:
        NoRangesError: the server answers a request for the rest with the whole.
    """
    fs, _ = open_filesystem(file.url)
    if from_start:
        out.truncate(0)
    done = out.seek(0, os.SEEK_END)
    if done == file.size_bytes:
        return
    with fs.open(file.path, "rb", block_size=0 if from_start else block_bytes) as source:
        if done:
            source.seek(done)
        while done < file.size_bytes:
            try:
                data = source.read(min(block_bytes, file.size_bytes - done))
            except ValueError as error:
                if from_start or "range requests" not in str(error):
                    raise
                raise NoRangesError from None
            if not data:
                raise OSError(f"the body ended at byte {done} of {file.size_bytes}")
            _append(out, data)
            done += len(data)


def _append(out: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[out.write(rest) :]
        except OSError as error:
            raise disk_problem(error, Path(str(out.name))) from error


def disk_problem(error: OSError, path: Path) -> SlideError:
    """What a failure to write to the cache means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SlideError(
            "disk_full",
            f"no space is left on the disk of the slide cache ({path}); free some, or set "
            "CYTORAY_CACHE_DIR to a larger disk or CYTORAY_CACHE_GB to less than this one has",
        )
    return SlideError(
        "cache_unusable",
        f"the slide cache cannot be written: {error}; set CYTORAY_CACHE_DIR to another folder",
    )


def stated_checksums(file: RemoteFile) -> dict[str, bytes]:
    """Digests of the whole content by algorithm, as far as the store gives them."""
    fs, _ = open_filesystem(file.url)
    found = dict(file.checksums)
    if hasattr(fs, "call_s3"):
        # A store that refuses the question gives no checksum; the size is still checked.
        with suppress(Exception):
            found |= _s3_checksums(fs, file.path)
    return found


def _s3_checksums(fs: Any, path: str) -> dict[str, bytes]:
    """S3's own checksums, and the ETag where it is the MD5 sum of the content.

    It is not for uploads in parts ("<digest>-<parts>"), for objects encrypted with a key of KMS
    or of the customer, and in directory buckets.
    """
    bucket, key, version = fs.split_path(path)
    which = {"VersionId": version} if version else {}
    head = fs.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED", **which)
    found = {}
    for name in S3_CHECKSUMS:
        value = head.get(f"Checksum{name}", "")
        if value and "-" not in value and head.get("ChecksumType") != "COMPOSITE":
            found[name.lower()] = b64decode(value)
    etag = str(head.get("ETag", "")).strip('"')
    keyed = "kms" in str(head.get("ServerSideEncryption")) or "SSECustomerAlgorithm" in head
    is_md5 = re.fullmatch("[0-9a-f]{32}", etag) and not keyed and not bucket.endswith("--x-s3")
    if is_md5 and os.environ.get("CYTORAY_ETAG_IS_MD5", "1") != "0":
        found["md5"] = bytes.fromhex(etag)
    return found


def checksum_problem(path: Path, checksums: dict[str, bytes]) -> str:
    """Compare a file with the best of its checksums that can be computed here.

    Returns:
        What differs, in words; empty when it agrees or nothing can be compared.
    """
    for name, make in DIGESTS.items():
        if name not in checksums:
            continue
        try:
            digest = make()
        except ImportError:
            continue
        with open(path, "rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
        found, stated = digest.digest().hex(), checksums[name].hex()
        return "" if found == stated else f"its {name} is {found}, the store states {stated}"
    return ""
