"""iBOT (Zhou et al. 2022), as CytoFM trains it: DINO and iBOT by a moving centre, no KoLeo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cytoray.ssl.build import build_self_distillation
from cytoray.ssl.self_distillation import SelfDistillation

if TYPE_CHECKING:
    from cytoray.training.config import PretrainConfig


def build_ibot(config: PretrainConfig) -> SelfDistillation:
    """The method with iBOT's weights wherever the configuration leaves them open."""
    return build_self_distillation(config, ibot_weight=1.0, koleo_weight=0.0, centering="centering")
