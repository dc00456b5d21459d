"""What an SSL method is to the training engine.

Shapes: b tiles of this rank, G global crops, L local crops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from cytoray.models.backbones import ViTBackbone


@dataclass(frozen=True)
class Crops:
    """Normalised crops on the device.

    Attributes:
        global_crops: float (b, G, 3, g, g).
        local_crops: float (b, L, 3, l, l), or None when there is none.
    """

    global_crops: Tensor
    local_crops: Tensor | None


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Where a batch stands in the run.

    Attributes:
        step: step of the run.
        global_batch: tiles of all ranks in this step.
        offset: position of this rank's first tile among them.
        teacher_temp: temperature of the teacher at this step.
    """

    step: int
    global_batch: int
    offset: int
    teacher_temp: float


class Method(nn.Module, ABC):
    """A trainable SSL method.

    `forward(crops, context)` returns (loss, metrics): the loss is this rank's part, such that the
    *sum* of the ranks' gradients is the gradient over the global batch; metrics are detached 0-d
    tensors, already those of the global batch.

    Attributes:
        student: the module whose parameters are trained.
    """

    student: nn.Module

    @abstractmethod
    def forward(self, crops: Crops, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one step."""

    @abstractmethod
    def clip_modules(self) -> dict[str, nn.Module]:
        """The sub-modules of `student` whose gradient norm is clipped, each on its own."""

    @abstractmethod
    def after_step(self, momentum: float) -> None:
        """Update what follows the student, e.g. the teacher by a moving average."""

    @abstractmethod
    def encoder(self) -> ViTBackbone:
        """The backbone to publish."""
