"""Config dataclasses to and from plain values (YAML), for `--config` and the run folder."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from cytoray.errors import InputError, raise_problems

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


def check_numbers(config: Any) -> None:
    """Refuse numbers below 0 and NaN: no field of any config has a use for them.

    Raises:
        InputError: names the flag of every such field.
    """
    raise_problems(
        "these values cannot be used:",
        [
            f"--{name.replace('_', '-')} must be 0 or more, not {number:g}"
            for name, number in _numbers(config, "")
            if not number >= 0
        ],
    )


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every number of a config and the dotted name of its field; mappings are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        prefix = f"{name}." if name else ""
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name), f"{prefix}{field.name}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, (int, float)):
        yield name, value


def _convert(hint: Any, value: Any, where: str) -> Any:
    """The value as the field's type asks for it; `where` names the field in messages."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(args[0], value, where)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in args if a is not type(None)]
        fits = len(options) > 1 or (value is None and type(None) in args)
        return value if fits else _convert(options[0], value, where)
    if origin is typing.Literal:
        if value not in args:
            raise InputError(f"{where}: {value!r} is none of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        return _convert_tuple(args, value, where)
    is_dataclass = isinstance(hint, type) and dataclasses.is_dataclass(hint)
    if is_dataclass or origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where}: {value!r} does not hold `name: value` lines")
        if is_dataclass:
            return from_plain(hint, value, where=where)
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: {value!r} is not a list")
    any_length = len(args) == 2 and args[1] is Ellipsis
    kinds = [args[0]] * len(value) if any_length else list(args)
    if len(kinds) != len(value):
        raise InputError(f"{where}: {value!r} must have {len(kinds)} values")
    return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Path:
        if not isinstance(value, (str, Path)):
            raise InputError(f"{where}: {value!r} is not a path")
        return Path(value)
    if hint is float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InputError(f"{where}: {value!r} is not a number") from None
    if hint in (int, bool, str) and not isinstance(value, hint):
        raise InputError(f"{where}: {value!r} is not {hint.__name__}")
    return value
