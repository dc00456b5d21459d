"""SimCLR (Chen et al. 2020): two views of a tile against all other views of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cytoray.ssl.base import StepContext
from cytoray.ssl.batch_norm import projection_mlp
from cytoray.ssl.build import configured_backbone, configured_drop_path
from cytoray.ssl.losses.nt_xent import nt_xent_loss
from cytoray.ssl.two_views import TwoViewMethod, TwoViewNetwork

if TYPE_CHECKING:
    from cytoray.training.config import PretrainConfig


class SimCLR(TwoViewMethod):
    """Backbone and projector under the NT-Xent loss; there is no teacher.

    Args:
        network: backbone and projector.
        temperature: of the cosines.
        options: of `TwoViewMethod`.
    """

    def __init__(self, network: TwoViewNetwork, *, temperature: float, **options: Any) -> None:
        super().__init__(network, with_teacher=False, **options)
        self.temperature = temperature

    def compare(
        self, features: Tensor, momentum: Tensor | None, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        loss = nt_xent_loss(
            self._predictions(features),
            temperature=self.temperature,
            global_batch=context.global_batch,
            offset=context.offset,
        )
        return loss, loss.detach()

    def _predictions(self, features: Tensor) -> Tensor:
        # Both views go through the projector as one batch.
        projections = self.student.projector(features.flatten(0, 1))
        return projections.unflatten(0, features.shape[:2])


def build_simclr(config: PretrainConfig) -> SimCLR:
    """SimCLR with a projector of two layers, each with batch norm."""
    chosen = config.two_views
    backbone = configured_backbone(config)
    widths = [backbone.embed_dim, chosen.hidden_dim or 2048, chosen.out_dim or 128]
    return SimCLR(
        TwoViewNetwork(backbone, projection_mlp(widths, last_norm=True)),
        temperature=chosen.temperature or 0.1,
        drop_path=configured_drop_path(config, backbone.embed_dim),
        seed=config.seed,
    )
