"""MoCo v3 (Chen et al. 2021) and, with a queue, v2: queries against keys of a moving average."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cytoray.ssl.base import StepContext
from cytoray.ssl.batch_norm import projection_mlp
from cytoray.ssl.build import configured_backbone, configured_drop_path
from cytoray.ssl.collectives import all_sum, gather_rows
from cytoray.ssl.losses.info_nce import info_nce_loss, queue_loss
from cytoray.ssl.two_views import TwoViewMethod, TwoViewNetwork

if TYPE_CHECKING:
    from cytoray.training.config import PretrainConfig


class MoCo(TwoViewMethod):
    """Version 3: each view's prediction against the other view's keys of the whole batch.

    Args:
        network: backbone, projector and predictor.
        temperature: of the cosines.
        options: of `TwoViewMethod`.
    """

    def __init__(self, network: TwoViewNetwork, *, temperature: float, **options: Any) -> None:
        super().__init__(network, with_teacher=True, **options)
        self.temperature = temperature

    def compare(
        self, features: Tensor, momentum: Tensor | None, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        queries = self._predictions(features)
        keys = self.momentum_projections(momentum)
        loss = self.contrast(queries, keys, context)
        return loss, all_sum(loss.detach().clone())

    def contrast(self, queries: Tensor, keys: Tensor, context: StepContext) -> Tensor:
        """This rank's part of the symmetric loss; queries and keys (b, 2, P)."""
        everyone = gather_keys(keys, context)
        first, second = (
            info_nce_loss(
                queries[:, view],
                everyone[:, 1 - view],
                temperature=self.temperature,
                offset=context.offset,
            )
            for view in range(2)
        )
        return first + second


class QueueMoCo(MoCo):
    """Version 2, symmetric: each view against the tile's other key and a queue of earlier keys.

    Args:
        network: backbone and projector.
        queue_size: keys K that are kept.
        out_dim: width P of a key.
        options: of `MoCo`.
    """

    queue: Tensor

    def __init__(
        self, network: TwoViewNetwork, *, queue_size: int, out_dim: int, **options: Any
    ) -> None:
        super().__init__(network, **options)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, out_dim), dim=-1))

    def contrast(self, queries: Tensor, keys: Tensor, context: StepContext) -> Tensor:
        """Mean over the views of the loss against the queue, which then takes in the keys."""
        queue = self.queue.clone()  # the buffer changes before the backward pass
        first, second = (
            queue_loss(
                queries[:, view],
                keys[:, 1 - view],
                queue,
                temperature=self.temperature,
                global_batch=context.global_batch,
            )
            for view in range(2)
        )
        self._take_in(gather_keys(keys, context))
        return (first + second) / 2

    @torch.no_grad()
    def _take_in(self, keys: Tensor) -> None:
        fresh = F.normalize(keys.flatten(0, 1).float(), dim=-1)
        queue = torch.cat([fresh, self.queue])[: len(self.queue)]
        self.queue.copy_(torch.where(fresh.isfinite().all(), queue, self.queue))


def gather_keys(keys: Tensor, context: StepContext) -> Tensor:
    """Keys of all ranks: float (b, 2, P) to (B, 2, P)."""
    rows = gather_rows(keys.flatten(1), total=context.global_batch, offset=context.offset)
    return rows.unflatten(1, keys.shape[1:])


def build_moco(config: PretrainConfig) -> MoCo:
    """Version 3 with its heads of three and two layers, all with batch norm; or with a queue."""
    chosen = config.two_views
    backbone = configured_backbone(config)
    width, hidden, out = backbone.embed_dim, chosen.hidden_dim or 4096, chosen.out_dim or 256
    options: dict[str, Any] = {
        "temperature": chosen.temperature or 0.2,
        "drop_path": configured_drop_path(config, width),
        "seed": config.seed,
    }
    if chosen.queue_size:
        projector = projection_mlp([width, hidden, out], norm=False)
        network = TwoViewNetwork(backbone, projector)
        return QueueMoCo(network, queue_size=chosen.queue_size, out_dim=out, **options)
    from_scratch = not (config.backbone.pretrained or config.backbone.init_from)
    if chosen.freeze_patch_embed and from_scratch:
        backbone.freeze_patches()
    projector = projection_mlp([width, hidden, hidden, out], last_norm=True)
    predictor = projection_mlp([out, hidden, out], last_norm=True)
    return MoCo(TwoViewNetwork(backbone, projector, predictor), **options)
