"""What SimCLR, MoCo and BYOL share: two alike views of a tile, a projector, perhaps a momentum
network and a predictor.

Shapes: b tiles of this rank, B of all ranks, D width of the backbone, P width of a projection.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cytoray.models.backbones import Backbone
from cytoray.models.drop_path import DropRows
from cytoray.ssl.base import Method, MicroBatch, StepContext
from cytoray.ssl.batch_norm import as_momentum_network
from cytoray.ssl.choices import Ahead, ChoiceRules, StepShape
from cytoray.ssl.collectives import gather_rows
from cytoray.ssl.monitor import effective_rank, feature_std
from cytoray.ssl.moving_average import MovingAverage, momentum_copy

if TYPE_CHECKING:
    from cytoray.training.config import PretrainConfig

TWO_VIEW_METHODS = ("byol", "moco", "simclr")


@dataclass(frozen=True, kw_only=True)
class TwoViewConfig:
    """Choices of `simclr`, `moco` and `byol`; a None is replaced by the method's published value.

    Attributes:
        temperature: of the cosines; None: 0.1 for `simclr`, 0.2 for `moco`; not used by `byol`.
        hidden_dim: of projector and predictor; None: 2048 for `simclr`, 4096 for `moco`, `byol`.
        out_dim: of the projections; None: 128 for `simclr`, 256 for `moco` and `byol`.
        queue_size: keys that `moco` keeps as in its version 2, without predictor and batch norm;
            0: version 3, against the keys of the batch.
        freeze_patch_embed: with `moco` version 3 and random weights, keep the patch projection as
            it was drawn (its authors: a ViT trains unstably otherwise).
    """

    temperature: float | None = None
    hidden_dim: int | None = None
    out_dim: int | None = None
    queue_size: int = 0
    freeze_patch_embed: bool = True


def two_view_problems(config: PretrainConfig) -> list[str]:
    """What keeps `config` from training on two views; empty if its method does not."""
    if config.method not in TWO_VIEW_METHODS:
        return []
    crops, chosen = config.crops, config.two_views
    checks = [
        (
            (crops.num_global, crops.num_local) == (2, 0),
            f"{config.method} compares two alike views of a tile; set crops.num_global to 2 and "
            "crops.num_local to 0",
        ),
        (
            chosen.temperature is None or chosen.temperature > 0,
            "two_views.temperature must be above 0",
        ),
        (
            all(size is None or size >= 1 for size in (chosen.hidden_dim, chosen.out_dim)),
            "two_views.hidden_dim and out_dim must be at least 1",
        ),
        (chosen.queue_size >= 0, "two_views.queue_size must not be negative"),
        (
            not chosen.queue_size or config.method == "moco",
            f"two_views.queue_size is of moco; set it to 0 for {config.method}",
        ),
    ]
    return [message for fine, message in checks if not fine]


@dataclass(frozen=True)
class _Compared:
    """What a comparison of all micro-batches has found.

    Attributes:
        slope: float (b, 2, D), gradient of the loss at the features of a micro-batch.
        whole: the loss over all ranks.
        first: (b of the rank, D), features of all first views.
        heads_join: whether the heads are to be part of this micro-batch's graph.
    """

    slope: Tensor
    whole: Tensor
    first: Tensor
    heads_join: bool


@dataclass(frozen=True)
class _Known:
    drop: DropRows | None
    momentum: Tensor | None  # float (b, 2, D), where it is still to be compared
    compared: _Compared | None


class TwoViewNetwork(nn.Module):
    """Backbone, projector and, for the side that is trained, perhaps a predictor."""

    def __init__(
        self, backbone: Backbone, projector: nn.Module, predictor: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor


def each_view(head: nn.Module, views: Tensor) -> Tensor:
    """`head` on each view of (b, 2, D) alone, so that batch norm sees one view: to (b, 2, P)."""
    return torch.stack([head(view) for view in views.unbind(1)], dim=1)


class TwoViewMethod(Method):
    """A method that compares two views of a tile.

    Args:
        network: the side that is trained.
        with_teacher: keep a moving average of its backbone and projector.
        drop_path: share of rows that the student's residual branches skip.
        seed: of drop path.
    """

    student: TwoViewNetwork
    teacher: TwoViewNetwork | None

    def __init__(
        self, network: TwoViewNetwork, *, with_teacher: bool, drop_path: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.student = network
        depth = network.backbone.depth
        self.choices = Ahead(ChoiceRules(seed=seed, depth=depth, drop_path=drop_path))
        network.backbone.mask_token.requires_grad_(False)
        self.teacher = None
        if with_teacher:
            self.teacher = momentum_copy(TwoViewNetwork(network.backbone, network.projector))

    def train(self, mode: bool = True) -> TwoViewMethod:
        """As `nn.Module.train`, but the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            as_momentum_network(self.teacher)
        return self

    def begin(self, batches: Sequence[MicroBatch], scale: float) -> list[_Known]:
        backbone = self.student.backbone
        chosen = self.choices(batches[0].context.step, StepShape.of(batches, backbone.patch_px))
        device = batches[0].crops.global_crops.device
        drop = [choices.drop_rows(device)[0] for choices in chosen]
        momentum = self._momentum_features(batches)
        if len(batches) == 1:
            return [_Known(drop[0], momentum, None)]
        return self._compare_first(batches, drop, momentum, scale)

    def _compare_first(
        self,
        batches: Sequence[MicroBatch],
        drop: Sequence[DropRows | None],
        momentum: Tensor | None,
        scale: float,
    ) -> list[_Known]:
        """Views are compared across micro-batches: heads and loss on the features of all of them.

        The features come from a pass without graph; their slopes are what the pass with graph,
        micro-batch by micro-batch, goes backward from (GradCache, Gao et al. 2021). The heads get
        their gradients here.
        """
        with torch.no_grad():
            parts = [self._features(*each) for each in zip(batches, drop, strict=True)]
        features = torch.cat(parts).requires_grad_()
        loss, whole = self.compare(features, momentum, batches[0].context)
        (loss * scale).backward()
        assert features.grad is not None
        slopes = (features.grad / scale).split([len(part) for part in parts])
        last = len(batches) - 1
        first = features.detach()[:, 0]
        return [
            _Known(rows, None, _Compared(slope, whole, first, heads_join=index == last))
            for index, (rows, slope) in enumerate(zip(drop, slopes, strict=True))
        ]

    def forward(self, batch: MicroBatch, known: _Known) -> tuple[Tensor, dict[str, Tensor]]:
        features = self._features(batch, known.drop)
        done = known.compared
        if done is None:
            loss, whole = self.compare(features, known.momentum, batch.context)
            return loss, {"loss": whole, "first": features[:, 0].detach()}
        loss = (features * done.slope).sum()
        if done.heads_join:
            # On no rows: a zero that makes the heads part of the graph whose gradients are summed
            # over the ranks.
            loss = loss + self._predictions(features[:0]).sum()
        return loss, {}

    def _features(self, batch: MicroBatch, drop: DropRows | None) -> Tensor:
        """Class tokens of the student, float (b, 2, D)."""
        images = batch.crops.global_crops
        tokens = self.student.backbone(images.flatten(0, 1), None, drop)
        return tokens.cls.unflatten(0, images.shape[:2])

    @torch.no_grad()
    def _momentum_features(self, batches: Sequence[MicroBatch]) -> Tensor | None:
        if self.teacher is None:
            return None
        backbone = self.teacher.backbone
        return torch.cat(
            [
                backbone(images.flatten(0, 1)).cls.unflatten(0, images.shape[:2])
                for images in (batch.crops.global_crops for batch in batches)
            ]
        )

    @torch.no_grad()
    def metrics(
        self,
        batches: Sequence[MicroBatch],
        known: Sequence[_Known],
        values: Sequence[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        done, context = known[0].compared, batches[0].context
        whole = values[0]["loss"] if done is None else done.whole
        first = values[0]["first"] if done is None else done.first
        everyone = gather_rows(first.float(), total=context.global_batch, offset=context.offset)
        return {
            "loss": whole,
            "feature_std": feature_std(everyone),
            "effective_rank": effective_rank(everyone),
        }

    @abstractmethod
    def compare(
        self, features: Tensor, momentum: Tensor | None, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        """The loss.

        Args:
            features: float (b, 2, D), class tokens of the student.
            momentum: float (b, 2, D), of the momentum network; None without one.
            context: where the batch stands in the run.

        Returns:
            This rank's loss (see `Method`) and, detached, the value over all ranks.
        """

    def _predictions(self, features: Tensor) -> Tensor:
        """The student's projections, or predictions: (b, 2, D) to (b, 2, P), view by view."""
        views = each_view(self.student.projector, features)
        return views if self.student.predictor is None else each_view(self.student.predictor, views)

    @torch.no_grad()
    def momentum_projections(self, momentum: Tensor | None) -> Tensor:
        """Projections of the momentum network: (b, 2, D) to (b, 2, P)."""
        assert self.teacher is not None
        assert momentum is not None
        return each_view(self.teacher.projector, momentum)

    def clip_modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {
            "backbone": self.student.backbone,
            "projector": self.student.projector,
        }
        if self.student.predictor is not None:
            modules["predictor"] = self.student.predictor
        return modules

    def after_step(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, where there is a teacher."""
        if self.teacher is not None:
            self._average.follow(momentum)

    @cached_property
    def _average(self) -> MovingAverage:
        assert self.teacher is not None
        old, new = self.teacher, self.student
        return MovingAverage((old.backbone, new.backbone), (old.projector, new.projector))

    def encoder(self) -> Backbone:
        """The trained side's backbone, as the papers evaluate it."""
        return self.student.backbone
