"""What goes into MLflow, as plain values: store URIs, parameters, keys. No MLflow needed here."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cytoray.errors import InputError

MAX_PARAM_CHARS = 500
MAX_NAME_CHARS = 250
KEY_TAG = "cytoray.key"
PARENT_TAG = "mlflow.parentRunId"

# Slide pixels, slide tables and reports stay in the run folder: a tracking server is often shared.
ARTIFACT_SUFFIXES = (".safetensors", ".json", ".yaml", ".yml", ".txt", ".md")

_SQLITE = "sqlite:///"


def resolve_uri(uri: str | None, folder: str | Path = ".") -> str:
    """Return the tracking URI to use, with every local path made absolute.

    A worker has another working folder than the driver, so a relative SQLite path would silently
    open a second, empty database there.

    Args:
        uri: an MLflow tracking URI, a path ending in `.db`, or None for `MLFLOW_TRACKING_URI` and,
            without that, `mlflow.db` in `folder`.
        folder: where the default database lies and what a relative path is relative to.

    Raises:
        InputError: the URI is a bare folder or a `file:` store, which MLflow no longer writes.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}mlflow.db"
    if uri.endswith(".db") and "://" not in uri:
        uri = _SQLITE + uri
    if uri.startswith(_SQLITE):
        path = Path(folder).expanduser().resolve() / Path(uri[len(_SQLITE) :]).expanduser()
        return _SQLITE + str(path.resolve())
    if "://" not in uri or uri.startswith("file:"):
        raise InputError(
            f"tracking URI {uri!r} is a folder, which MLflow no longer writes to: give "
            "sqlite:///path/mlflow.db, or the http(s):// address of a server"
        )
    return uri


def sqlite_path(uri: str) -> Path | None:
    """The database file of a resolved SQLite URI; None for any other store."""
    return Path(uri[len(_SQLITE) :]) if uri.startswith(_SQLITE) else None


def flatten_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a nested config to MLflow parameters.

    Returns:
        `{"model.lora_rank": "4", ...}`: names joined by dots (characters MLflow refuses become
        `_`), values as text of at most 500 characters, sequences as JSON.
    """
    flat: dict[str, str] = {}
    for name, value in params.items():
        full_name = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten_params(value, f"{full_name}."))
        else:
            flat[clean_name(full_name)] = shorten(_as_text(value), MAX_PARAM_CHARS)
    return flat


def _as_text(value: Any) -> str:
    if isinstance(value, (list, tuple, set, frozenset, Mapping)):
        plain = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return json.dumps(plain, default=str)
    return str(value)


def shorten(text: str, max_chars: int) -> str:
    """Cut `text` to `max_chars`, ending in `...` where something was cut."""
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def clean_name(name: str) -> str:
    """A parameter, metric or tag name with only the characters MLflow accepts."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:MAX_NAME_CHARS].strip("/. ") or "_"


def key_value(key: str) -> str:
    """The tag value for a run key: the key itself, or its hash if a filter could not quote it."""
    if len(key) <= MAX_NAME_CHARS and re.fullmatch(r"[\w\-.:/=,+@ ]+", key):
        return key
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def check_artifacts(path: Path) -> list[Path]:
    """The files to upload for `path` (a file or a folder).

    Raises:
        ValueError: one of them is of a kind that may hold patient data (images, tables, pages).
        FileNotFoundError: nothing is there.
    """
    if not path.exists():
        raise FileNotFoundError(f"no artifact at {path}")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    refused = [file.name for file in files if file.suffix.lower() not in ARTIFACT_SUFFIXES]
    if refused:
        raise ValueError(
            f"{', '.join(refused[:5])} may hold patient data and is not sent to MLflow; "
            f"only {', '.join(ARTIFACT_SUFFIXES)} files are"
        )
    return files


def content_hash(files: list[Path], root: Path) -> str:
    """SHA-256 over names (relative to `root`) and contents, the same wherever `root` lies."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
