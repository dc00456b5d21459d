"""What SimCLR, MoCo and BYOL share: two alike views of a tile, a projector, perhaps a momentum
network and a predictor.

Shapes: b tiles of this rank, B of all ranks, D width of the backbone, P width of a projection.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cytoray.models.backbones import ViTBackbone
from cytoray.models.drop_path import make_drop_rows
from cytoray.ssl.base import Crops, Method, StepContext
from cytoray.ssl.collectives import gather_rows
from cytoray.ssl.monitor import effective_rank, feature_std

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


class TwoViewNetwork(nn.Module):
    """Backbone, projector and, for the side that is trained, perhaps a predictor."""

    def __init__(
        self, backbone: ViTBackbone, projector: nn.Module, predictor: nn.Module | None = None
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
        self.drop_path = drop_path
        self.seed = seed
        network.backbone.mask_token.requires_grad_(False)
        self.teacher = None
        if with_teacher:
            copied = TwoViewNetwork(*copy.deepcopy((network.backbone, network.projector)))
            self.teacher = copied.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TwoViewMethod:
        """As `nn.Module.train`, but the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, crops: Crops, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        tiles, views = crops.global_crops.shape[:2]
        images = crops.global_crops.flatten(0, 1)
        drop = make_drop_rows(
            self.seed,
            context.step,
            group=0,
            depth=self.student.backbone.depth,
            total=context.global_batch * views,
            start=context.offset * views,
            stop=(context.offset + tiles) * views,
            rate=self.drop_path if self.training else 0.0,
            device=images.device,
        )
        features = self.student.backbone(images, None, drop).cls.unflatten(0, (tiles, views))
        loss, whole = self.compare(features, crops.global_crops, context)
        first = features[:, 0].detach().float()
        everyone = gather_rows(first, total=context.global_batch, offset=context.offset)
        return loss, {
            "loss": whole,
            "feature_std": feature_std(everyone),
            "effective_rank": effective_rank(everyone),
        }

    @abstractmethod
    def compare(
        self, features: Tensor, images: Tensor, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        """The loss.

        Args:
            features: float (b, 2, D), class tokens of the student.
            images: float (b, 2, 3, g, g).
            context: where the batch stands in the run.

        Returns:
            This rank's loss (see `Method`) and, detached, the value over all ranks.
        """

    @torch.no_grad()
    def teacher_projections(self, images: Tensor) -> Tensor:
        """Projections of the momentum network: (b, V, 3, g, g) to float (b, V, P)."""
        assert self.teacher is not None
        tokens = self.teacher.backbone(images.flatten(0, 1)).cls
        return each_view(self.teacher.projector, tokens.unflatten(0, images.shape[:2]))

    def clip_modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {
            "backbone": self.student.backbone,
            "projector": self.student.projector,
        }
        if self.student.predictor is not None:
            modules["predictor"] = self.student.predictor
        return modules

    @torch.no_grad()
    def after_step(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, where there is a teacher."""
        if self.teacher is None:
            return
        for old, new in (
            (self.teacher.backbone, self.student.backbone),
            (self.teacher.projector, self.student.projector),
        ):
            torch._foreach_lerp_(list(old.parameters()), list(new.parameters()), 1.0 - momentum)

    def encoder(self) -> ViTBackbone:
        """The trained side's backbone, as the papers evaluate it."""
        return self.student.backbone
