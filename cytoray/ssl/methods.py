"""The SSL methods by name. A new one is a file with a builder and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cytoray.ssl.base import Method
from cytoray.ssl.dino import build_dino
from cytoray.ssl.dinov2 import build_dinov2
from cytoray.ssl.ibot import build_ibot

if TYPE_CHECKING:
    from cytoray.training.config import PretrainConfig

METHODS: dict[str, Callable[[PretrainConfig], Method]] = {
    "dino": build_dino,
    "dinov2": build_dinov2,
    "ibot": build_ibot,
}
