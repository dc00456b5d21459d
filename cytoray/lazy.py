"""Names of a package whose modules are imported when a name is first asked for (PEP 562).

A process that trains a head on features needs neither timm nor scikit-learn, and importing them
takes it longer than a short trial.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """A `__getattr__` for the package's `__init__`.

    Args:
        package: its `__name__`.
        homes: the public names by the module that defines them.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def find(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)

    return find
