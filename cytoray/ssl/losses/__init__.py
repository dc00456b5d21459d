"""SSL losses, one a file; each returns a part that sums over the ranks to the loss."""

from cytoray.ssl.losses.cross_entropy import soft_cross_entropy
from cytoray.ssl.losses.dino import dino_loss
from cytoray.ssl.losses.ibot import ibot_loss
from cytoray.ssl.losses.info_nce import info_nce_loss, queue_loss
from cytoray.ssl.losses.koleo import KoleoLoss, koleo, koleo_loss
from cytoray.ssl.losses.negative_cosine import byol_loss
from cytoray.ssl.losses.nt_xent import nt_xent, nt_xent_loss
from cytoray.ssl.losses.targets import (
    TARGETS,
    MovingCentre,
    Sinkhorn,
    build_targets,
    sinkhorn_knopp,
)

__all__ = [
    "TARGETS",
    "KoleoLoss",
    "MovingCentre",
    "Sinkhorn",
    "build_targets",
    "byol_loss",
    "dino_loss",
    "ibot_loss",
    "info_nce_loss",
    "koleo",
    "koleo_loss",
    "nt_xent",
    "nt_xent_loss",
    "queue_loss",
    "sinkhorn_knopp",
    "soft_cross_entropy",
]
