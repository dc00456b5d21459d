"""SSL losses, one a file; each returns a part that sums over the ranks to the loss."""

from cytoray.ssl.losses.dino import dino_loss, soft_cross_entropy
from cytoray.ssl.losses.ibot import ibot_loss
from cytoray.ssl.losses.koleo import koleo, koleo_loss
from cytoray.ssl.losses.targets import (
    TARGETS,
    MovingCentre,
    Sinkhorn,
    build_targets,
    sinkhorn_knopp,
)

__all__ = [
    "TARGETS",
    "MovingCentre",
    "Sinkhorn",
    "build_targets",
    "dino_loss",
    "ibot_loss",
    "koleo",
    "koleo_loss",
    "sinkhorn_knopp",
    "soft_cross_entropy",
]
