"""DINO (Caron et al. 2021): cross-entropy between class tokens by a moving centre, no masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cytoray.ssl.build import build_self_distillation
from cytoray.ssl.self_distillation import SelfDistillation

if TYPE_CHECKING:
    from cytoray.training.config import PretrainConfig


def build_dino(config: PretrainConfig) -> SelfDistillation:
    """The method with DINO's weights wherever the configuration leaves them open."""
    return build_self_distillation(config, ibot_weight=0.0, koleo_weight=0.0, centering="centering")
