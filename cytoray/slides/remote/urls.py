"""URLs of slides: their protocols, their secrets, and the file systems behind them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import fsspec
from fsspec.config import conf

from cytoray.errors import InputError, raise_problems

# What to install, and where credentials are looked for, by protocol.
INSTALL = {
    "s3": "pip install 'cytoray[s3]'",
    "s3a": "pip install 'cytoray[s3]'",
    "gs": "pip install gcsfs",
    "gcs": "pip install gcsfs",
    "az": "pip install adlfs",
    "abfs": "pip install adlfs",
    "abfss": "pip install adlfs",
}
_AWS = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or the machine's role), and "
    "AWS_ENDPOINT_URL for a store of your own"
)
_AZURE = "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or the machine's identity)"
_HTTP = "FSSPEC_HTTP_CLIENT_KWARGS (for a signed URL: whether its signature has run out)"
CREDENTIALS = {
    "s3": _AWS,
    "s3a": _AWS,
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (or the machine's service account)",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS (or the machine's service account)",
    "az": _AZURE,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "http": _HTTP,
    "https": _HTTP,
}
# user:password@, where a password may hold slashes; a lone user is a secret on the web only.
_SIGNED_IN = re.compile(
    r"://[^/@\s:]*:(?!:|\d+/)[^@\s]*@|(?<=http)://[^/@\s]+@|(?<=https)://[^/@\s]+@"
)
_QUERY_VALUE = re.compile(r"([?&](?!versionId=)[^=&#\s]+)=[^&#\s'\")]*")


def is_remote(path: str) -> bool:
    """Whether `path` is a URL other than file://."""
    return "://" in path and not path.startswith(("file://", "local://"))


def local_path(path: str) -> str:
    """The path without file:// in front of it."""
    if path.startswith(("file://", "local://")):
        return str(fsspec.get_filesystem_class("file")._strip_protocol(path))
    return path


def redact(text: str) -> str:
    """`text` with what may be a secret in its URLs starred out: user:password@, query values."""
    if "://" not in text:
        return text
    return _QUERY_VALUE.sub(r"\1=***", _SIGNED_IN.sub("://***@", text))


def store_of(url: str) -> str:
    """What answers for a URL: protocol and bucket (or host) of the store."""
    return "/".join(url.rsplit("::", 1)[-1].split("/", 3)[:3]).lower()


def protocol_of(url: str) -> str:
    """The protocol that reaches the store, e.g. `s3`; the last one of a chained URL."""
    return url.rsplit("::", 1)[-1].split("://", 1)[0].lower()


def check_urls(paths: Iterable[str]) -> None:
    """Check the URLs of a manifest without asking any store.

    Raises:
        InputError: a protocol nobody knows, a package that is missing here, or credentials in a
            URL (they would end up in the slide table).
    """
    protocols: dict[str, str] = {}
    signed_in = ""
    for path in paths:
        if path and is_remote(path):
            protocols.setdefault(protocol_of(path), path)
            if not signed_in and _SIGNED_IN.search(path):
                signed_in = path
    problems = []
    for example in protocols.values():
        try:
            _check_protocol(example)
        except InputError as error:
            problems.append(str(error))
    if signed_in:
        problems.append(
            f"{redact(signed_in)} carries credentials, which tables would show; take them out "
            f"and give them through {where_credentials(signed_in)}"
        )
    raise_problems("slides at these URLs cannot be read:", problems)


def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it.

    Raises:
        InputError: unknown protocol, or a package is missing.
    """
    _check_protocol(url)
    options = next((make for start, make in _OPTIONS if url.lower().startswith(start)), dict)
    return fsspec.url_to_fs(url, **options())


def where_credentials(url: str) -> str:
    """Where the user gives the credentials for the store of a URL, in words."""
    protocol = protocol_of(url)
    return CREDENTIALS.get(protocol, f"FSSPEC_{protocol.upper()}_... (fsspec's configuration)")


def _check_protocol(url: str) -> None:
    for part in url.split("::"):
        protocol = part.split("://", 1)[0].lower()
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            how = INSTALL.get(protocol, str(error))
            raise InputError(f"{protocol}:// needs a package that is not here: {how}") from None
        except ValueError:
            raise InputError(
                f"nobody knows the protocol {protocol}:// of {redact(url)}; use e.g. s3, gs, az, "
                "https"
            ) from None


def _http_options() -> dict[str, Any]:
    """No limit on the whole of a download, only on silence; the user's own options win."""
    import aiohttp

    client: dict[str, Any] = {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    }
    for protocol in ("http", "https"):
        client |= conf.get(protocol, {}).get("client_kwargs", {})
    return {"client_kwargs": client}


def _s3_options() -> dict[str, Any]:
    """One attempt a request: trying again is `Attempts`' part, and the two would multiply."""
    config: dict[str, Any] = {}
    for protocol in ("s3", "s3a"):
        config |= conf.get(protocol, {}).get("config_kwargs", {})
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        config = {"retries": {"max_attempts": 0}} | config
    return {"config_kwargs": config} if config else {}


_OPTIONS = (("http", _http_options), ("s3", _s3_options))
