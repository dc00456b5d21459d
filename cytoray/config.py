"""Config dataclasses to and from plain values (YAML), for `--config` and the run folder."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from cytoray.errors import InputError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """A config as nested dicts, lists, strings and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.value
    return value


def from_plain(kind: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """Build the dataclass `kind` from nested dicts; fields left out keep their defaults.

    Raises:
        InputError: unknown or missing fields, all at once, or a value that does not fit.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    problems = [
        f"{prefix}{name} is not a field; valid: {', '.join(fields)}"
        for name in values
        if name not in fields
    ]
    problems += [
        f"{prefix}{name} is missing"
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if problems:
        raise InputError("the config does not fit", problems)
    return kind(**{k: _convert(hints[k], v, f"{prefix}{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _convert(typing.get_args(hint)[0], value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        return _convert(options[0], value, where) if len(options) == 1 else value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_plain(hint, value, where=where)
    if origin is tuple and isinstance(value, (list, tuple)):
        args = typing.get_args(hint)
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        kinds = [inner] * len(value) if inner is not None else list(args)
        return tuple(_convert(k, v, where) for k, v in zip(kinds, value, strict=False))
    if hint is Path:
        return Path(value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise InputError(f"{where}: {value!r} is not a number") from None
    if hint in (int, bool, str) and not isinstance(value, hint):
        raise InputError(f"{where}: {value!r} is not {hint.__name__}")
    return value
