"""What a store says of a slide, without downloading it."""

from __future__ import annotations

import hashlib
import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from cytoray.errors import InputError, SlideError
from cytoray.slides.remote.retry import Attempts, DownloadPolicy
from cytoray.slides.remote.urls import open_filesystem, protocol_of, redact

# Formats whose pixels lie in files beside the one that is named, in no folder of its name.
SCATTERED_SUFFIXES = (".dcm", ".vms", ".vmu", ".vsi")
_KNOWN_SLIDES = 4096
_UNSAFE_NAME = re.compile(r'[\\/:*?"<>|\x00-\x1f]')


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One object of a store.

    Attributes:
        url: the slide it belongs to.
        path: its name in the file system of that URL.
        name: its name in the cache, relative, with forward slashes.
        size_bytes: as the store states it.
        modified_ns: last modification; for a store that tells only an etag, a number that changes
            with it; None without either.
        etag: the store's mark of the version; may be empty.
        checksums: digests by algorithm, as far as a plain look-up shows them.
    """

    url: str
    path: str
    name: str
    size_bytes: int
    modified_ns: int | None
    etag: str
    checksums: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class RemoteSlide:
    """A slide at a URL: the file that is named first, then the files of its folder."""

    url: str
    files: tuple[RemoteFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def version(self) -> str:
        """32 hex digits that change with the URL and with the content behind it."""
        parts = [self.url, *(f"{f.name}\n{f.size_bytes}\n{f.modified_ns}\n{f.etag}"
                             for f in self.files)]  # fmt: skip
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def remote_slide(
    url: str, *, fresh: bool = False, policy: DownloadPolicy | None = None
) -> RemoteSlide:
    """What the store says of a slide, without downloading it; remembered by this process.

    Args:
        url: any fsspec URL.
        fresh: ask again even when it is remembered.
        policy: how often to ask a store that does not answer.

    Raises:
        InputError: unknown protocol, or a package is missing.
        SlideError: `missing_file`, `access_denied`, `not_a_slide` (a folder), `empty_file`,
            `unsupported_remote` (several files, or a store that states no size), or
            `download_failed`.
    """
    if not fresh and url in _known:
        _known.move_to_end(url)
        return _known[url]
    _known.pop(url, None)
    attempts = Attempts(url, policy or DownloadPolicy())
    while True:
        try:
            found = _look_up(url, fresh)
            break
        except (SlideError, InputError):
            raise
        except Exception as error:  # each file system has exceptions of its own
            attempts.failed(error)
    attempts.succeeded()
    _known[url] = found
    while len(_known) > _KNOWN_SLIDES:
        _known.popitem(last=False)
    return found


_known: OrderedDict[str, RemoteSlide] = OrderedDict()


def remote_fingerprint(url: str) -> tuple[int | None, int | None]:
    """(size in bytes, modification time in ns) of a remote slide; (None, None) without one."""
    try:
        file = remote_slide(url).files[0]
    except (SlideError, InputError):
        return None, None
    return file.size_bytes, file.modified_ns


def _look_up(url: str, fresh: bool) -> RemoteSlide:
    shown = redact(url)
    fs, path = open_filesystem(url)
    if fresh:
        fs.invalidate_cache()
    name = cache_name(url, path)
    suffix = name[name.rfind(".") :].lower()
    if suffix in SCATTERED_SUFFIXES:
        raise SlideError(
            "unsupported_remote",
            f"{shown}: the pixels of a {suffix} lie in several files that cannot be told from its "
            "name; copy its folder to the nodes and give the local path",
        )
    main = described(url, path, name, fs.info(path))
    if main.size_bytes == 0:
        raise SlideError("empty_file", f"{shown} has zero bytes; copy it again")
    if suffix != ".mrxs":
        return RemoteSlide(url, (main,))
    return RemoteSlide(url, (main, *_companions(url, fs, path, name)))


def _companions(url: str, fs: Any, path: str, name: str) -> list[RemoteFile]:
    """The files of the folder beside a .mrxs that has its name."""
    shown = redact(url)
    if protocol_of(url) in ("http", "https"):
        raise SlideError(
            "unsupported_remote",
            f"{shown}: a .mrxs needs the folder beside it, and http cannot list folders; use an "
            "object store, or copy both to the nodes",
        )
    folder = path[: -len(".mrxs")].rstrip("/")
    files = []
    for found, info in sorted(fs.find(folder, detail=True).items()):
        inner = found[found.index(folder) + len(folder) + 1 :] if folder in found else ""
        if not inner or ".." in inner.split("/"):
            continue
        files.append(described(url, found, f"{name[: -len('.mrxs')]}/{inner}", info))
    if not files:
        raise SlideError("missing_file", f"{shown}: the folder of the same name beside it is empty")
    return files


def described(url: str, path: str, name: str, info: Mapping[str, Any]) -> RemoteFile:
    """A `RemoteFile` from what `fs.info` or `fs.find` say of it; every store has names of its own.

    Raises:
        SlideError: `not_a_slide` for a folder, `unsupported_remote` when no size is stated.
    """
    if info.get("type") == "directory":
        raise SlideError("not_a_slide", f"{redact(url)} is a folder, not a slide file")
    if info.get("size") is None:
        raise SlideError(
            "unsupported_remote",
            f"{redact(url)}: the store does not state the file's size, so that a broken download "
            "could not be told from a whole one; copy it to the nodes",
        )
    etag = str(next((info[k] for k in ("ETag", "etag", "e_tag") if info.get(k)), "")).strip('"')
    modified_ns = _modified_ns(info)
    if modified_ns is None and etag:
        modified_ns = int.from_bytes(hashlib.sha256(etag.encode()).digest()[:8], "big") >> 1
    return RemoteFile(
        url=url,
        path=path,
        name=name,
        size_bytes=int(info["size"]),
        modified_ns=modified_ns,
        etag=etag,
        checksums=tuple(sorted(_stated_checksums(info).items())),
    )


def _modified_ns(info: Mapping[str, Any]) -> int | None:
    names = ("LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created")
    value = next((info[name] for name in names if info.get(name)), None)
    try:
        if isinstance(value, str):
            is_iso = value[:4].isdigit()
            value = datetime.fromisoformat(value) if is_iso else parsedate_to_datetime(value)
        if isinstance(value, datetime):
            value = value if value.tzinfo else value.replace(tzinfo=UTC)
            return round(value.timestamp() * 1e6) * 1000
        return None if value is None else round(float(value) * 1e6) * 1000
    except (TypeError, ValueError):
        return None


def _stated_checksums(info: Mapping[str, Any]) -> dict[str, bytes]:
    """Digests of the whole content that a look-up shows: HTTP headers, Google's and Azure's."""
    stated = {"md5": info.get("Content-MD5") or info.get("md5Hash"), "crc32c": info.get("crc32c")}
    for part in str(info.get("Digest") or "").split(","):
        algorithm, _, value = part.strip().partition("=")
        stated[algorithm.lower().replace("sha-", "sha")] = value
    found = {}
    for algorithm, value in stated.items():
        try:
            digest = b64decode(value, validate=True) if isinstance(value, str) else b""
        except Base64Error:
            digest = b""
        if digest:
            found[algorithm] = digest
    settings = info.get("content_settings")
    azure = settings.get("content_md5") if settings else None
    return found | ({"md5": bytes(azure)} if azure else {})


def cache_name(url: str, path: str) -> str:
    """A file name for the cache that keeps the suffix and is safe on any file system."""
    if protocol_of(url) in ("http", "https") and "::" not in url:
        path = unquote(urlsplit(path).path)
    name = path.partition("?versionId=")[0].rstrip("/").rsplit("/", 1)[-1]
    name = _UNSAFE_NAME.sub("_", name).lstrip(".") or "slide"
    stem, dot, suffix = name.rpartition(".")
    if not dot or len(suffix) > 10:
        stem, dot, suffix = name, "", ""
    return stem.encode()[:100].decode(errors="ignore") + dot + suffix
