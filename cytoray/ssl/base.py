"""What an SSL method is to the training engine.

Shapes: b tiles of a micro-batch, G global crops, L local crops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from cytoray.models.backbones import Backbone


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
        offset: position of the first tile of the batch among them.
        teacher_temp: temperature of the teacher at this step.
    """

    step: int
    global_batch: int
    offset: int
    teacher_temp: float


@dataclass(frozen=True)
class MicroBatch:
    """Tiles that go through the student together: a rank's share of a step, or a part of it."""

    crops: Crops
    context: StepContext

    def split(self, parts: int) -> list[MicroBatch]:
        """Cut into `parts` runs of tiles whose sizes differ by at most one."""
        tiles = len(self.crops.global_crops)
        cuts = [tiles * part // parts for part in range(parts + 1)]
        return [self._rows(cuts[i], cuts[i + 1]) for i in range(parts)]

    def _rows(self, start: int, stop: int) -> MicroBatch:
        big, small = self.crops.global_crops, self.crops.local_crops
        crops = Crops(big[start:stop], None if small is None else small[start:stop])
        return MicroBatch(crops, replace(self.context, offset=self.context.offset + start))


class Method(nn.Module, ABC):
    """A trainable SSL method.

    A step is `begin` over all micro-batches of the rank, then `forward` and a backward pass for
    each of them, then `metrics`. Losses are parts: the *sum* of their gradients, over the
    micro-batches and over the ranks, is the gradient over the global batch, however it was cut.
    What needs the whole batch (targets, negatives, batch norm, nearest neighbours) is done in
    `begin`.

    Attributes:
        student: the module whose parameters are trained.
    """

    student: nn.Module

    @abstractmethod
    def begin(self, batches: Sequence[MicroBatch], scale: float) -> list[Any]:
        """What each micro-batch must know of the others; called once a step.

        Args:
            batches: all micro-batches of this rank.
            scale: factor that the engine gives each loss before its backward pass.

        Returns:
            One value for each micro-batch, for `forward`.
        """

    @abstractmethod
    def forward(self, batch: MicroBatch, known: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch (see above) and detached tensors for `metrics`.

        Args:
            batch: the micro-batch.
            known: its value from `begin`.
        """

    @abstractmethod
    def metrics(
        self,
        batches: Sequence[MicroBatch],
        known: Sequence[Any],
        values: Sequence[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Detached 0-d tensors of the global batch, `loss` among them; equal on all ranks."""

    @abstractmethod
    def clip_modules(self) -> dict[str, nn.Module]:
        """The sub-modules of `student` whose gradient norm is clipped, each on its own."""

    @abstractmethod
    def after_step(self, momentum: float) -> None:
        """Update what follows the student, e.g. the teacher by a moving average."""

    @abstractmethod
    def encoder(self) -> Backbone:
        """The backbone to publish."""
