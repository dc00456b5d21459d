"""The SSL methods by name. A new one is a file with a builder and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cytoray.ssl.base import Method
from cytoray.ssl.byol import build_byol
from cytoray.ssl.dino import build_dino
from cytoray.ssl.dinov2 import build_dinov2
from cytoray.ssl.ibot import build_ibot
from cytoray.ssl.moco import build_moco
from cytoray.ssl.simclr import build_simclr

if TYPE_CHECKING:
    from cytoray.training.config import PretrainConfig

METHODS: dict[str, Callable[[PretrainConfig], Method]] = {
    "byol": build_byol,
    "dino": build_dino,
    "dinov2": build_dinov2,
    "ibot": build_ibot,
    "moco": build_moco,
    "simclr": build_simclr,
}
