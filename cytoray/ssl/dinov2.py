"""DINOv2 (Oquab et al. 2023): DINO on class tokens, iBOT on masked patches, KoLeo, Sinkhorn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cytoray.ssl.build import build_self_distillation
from cytoray.ssl.self_distillation import SelfDistillation

if TYPE_CHECKING:
    from cytoray.training.config import PretrainConfig


def build_dinov2(config: PretrainConfig) -> SelfDistillation:
    """The method with DINOv2's weights wherever the configuration leaves them open."""
    return build_self_distillation(config, ibot_weight=1.0, koleo_weight=0.1, centering="sinkhorn")
