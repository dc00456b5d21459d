"""Results as values that JSON can hold."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any


def json_ready(value: Any) -> Any:
    """Turn a result into what JSON knows, so that any reader can parse it.

    Dataclasses and mappings become dicts, tuples, sets and arrays lists, numpy scalars Python
    numbers, enums their values, NaN and infinities null, everything else (paths, dates) text.
    """
    if isinstance(value, enum.Enum):
        return json_ready(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: json_ready(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): json_ready(item) for name, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((json_ready(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    to_list = getattr(value, "tolist", None)
    return str(value) if to_list is None else json_ready(to_list())
