"""Self-supervised methods; `METHODS` lists them by name."""

from cytoray.ssl.augment import render_crops, render_views
from cytoray.ssl.base import Crops, Method, StepContext
from cytoray.ssl.masks import MaskPolicy, make_block_masks
from cytoray.ssl.methods import METHODS

__all__ = [
    "METHODS",
    "Crops",
    "MaskPolicy",
    "Method",
    "StepContext",
    "make_block_masks",
    "render_crops",
    "render_views",
]
