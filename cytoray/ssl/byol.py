"""BYOL (Grill et al. 2020): predict the projections of a moving average, without negatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cytoray.ssl.base import StepContext
from cytoray.ssl.batch_norm import projection_mlp
from cytoray.ssl.build import configured_backbone, configured_drop_path
from cytoray.ssl.collectives import all_sum
from cytoray.ssl.losses.negative_cosine import byol_loss
from cytoray.ssl.two_views import TwoViewMethod, TwoViewNetwork

if TYPE_CHECKING:
    from cytoray.training.config import PretrainConfig


class BYOL(TwoViewMethod):
    """Each view's prediction against the momentum network's projection of the other view.

    Args:
        network: backbone, projector and predictor.
        options: of `TwoViewMethod`.
    """

    def __init__(self, network: TwoViewNetwork, **options: Any) -> None:
        super().__init__(network, with_teacher=True, **options)

    def compare(
        self, features: Tensor, momentum: Tensor | None, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        predictions = self._predictions(features)
        targets = self.momentum_projections(momentum)
        loss = byol_loss(predictions, targets, global_batch=context.global_batch)
        return loss, all_sum(loss.detach().clone())


def build_byol(config: PretrainConfig) -> BYOL:
    """BYOL with its heads of two layers and batch norm between them."""
    chosen = config.two_views
    backbone = configured_backbone(config)
    hidden, out = chosen.hidden_dim or 4096, chosen.out_dim or 256
    network = TwoViewNetwork(
        backbone,
        projection_mlp([backbone.embed_dim, hidden, out]),
        projection_mlp([out, hidden, out]),
    )
    drop_path = configured_drop_path(config, backbone.embed_dim)
    return BYOL(network, drop_path=drop_path, seed=config.seed)
