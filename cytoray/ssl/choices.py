"""The random choices of a step (masks, drop path), made on the host before the device needs them.

They are pure functions of the seed, the step and the place in the global batch. So those of the
next step are made on a thread while this one runs, and nothing is lost if they are not wanted.

Shapes: b tiles of a micro-batch, V views a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from cytoray.models.drop_path import DropRows, KeptRows, choose_drop_rows
from cytoray.ssl.base import MicroBatch
from cytoray.ssl.masks import MaskedPatches, MaskPolicy, make_block_masks


@dataclass(frozen=True)
class StepShape:
    """All that the choices of a step hang on, but its number.

    Attributes:
        global_batch: tiles of all ranks.
        runs: (first tile, number of tiles) of each micro-batch.
        views: views a tile of each group of crops, global ones first.
        grid: patches per column and per row of a global crop.
    """

    global_batch: int
    runs: tuple[tuple[int, int], ...]
    views: tuple[int, ...]
    grid: tuple[int, int]

    @staticmethod
    def of(batches: Sequence[MicroBatch], patch_px: int) -> StepShape:
        """Read from the micro-batches of a rank."""
        crops = batches[0].crops
        height, width = crops.global_crops.shape[-2:]
        views = [crops.global_crops.shape[1]]
        if crops.local_crops is not None:
            views.append(crops.local_crops.shape[1])
        return StepShape(
            batches[0].context.global_batch,
            tuple((batch.context.offset, len(batch.crops.global_crops)) for batch in batches),
            tuple(views),
            (height // patch_px, width // patch_px),
        )


@dataclass(frozen=True)
class Choices:
    """Of one micro-batch.

    Attributes:
        masked: patches hidden from the student, None when the method hides none.
        kept: rows each residual branch sees, for each group of crops.
    """

    masked: MaskedPatches | None
    kept: tuple[KeptRows | None, ...]

    def drop_rows(self, device: torch.device) -> list[DropRows | None]:
        """The kept rows on the device."""
        return [None if kept is None else kept.to(device) for kept in self.kept]


@dataclass(frozen=True, kw_only=True)
class ChoiceRules:
    """How a method chooses.

    Attributes:
        seed: of the run.
        depth: blocks of the backbone.
        drop_path: share of rows that a residual branch skips.
        masks: None: nothing is masked.
    """

    seed: int
    depth: int
    drop_path: float
    masks: MaskPolicy | None = None

    def __call__(self, step: int, shape: StepShape) -> list[Choices]:
        """Choices of every micro-batch of a step."""
        return [self._of_run(step, shape, *run) for run in shape.runs]

    def _of_run(self, step: int, shape: StepShape, first: int, tiles: int) -> Choices:
        masked = None
        if self.masks is not None:
            views = shape.views[0]
            masked = make_block_masks(
                self.seed,
                step,
                num_crops=shape.global_batch * views,
                start=first * views,
                stop=(first + tiles) * views,
                grid=shape.grid,
                policy=self.masks,
            )
        kept = tuple(
            choose_drop_rows(
                self.seed,
                step,
                group=group,
                depth=self.depth,
                total=shape.global_batch * views,
                start=first * views,
                stop=(first + tiles) * views,
                rate=self.drop_path,
            )
            for group, views in enumerate(shape.views)
        )
        return Choices(masked, kept)


class Ahead:
    """Calls `make(step, shape)`, having made what the next step will ask for in the meantime.

    Args:
        make: a pure function.
    """

    def __init__(self, make: Callable[[int, StepShape], list[Choices]]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="choices")
        self._next: tuple[int, StepShape, Future[list[Choices]]] | None = None

    def __call__(self, step: int, shape: StepShape) -> list[Choices]:
        """The choices of a step; those of `step + 1` are begun."""
        expected, self._next = self._next, None
        if expected is not None and expected[:2] == (step, shape):
            made = expected[2].result()
        else:
            made = self._make(step, shape)
        self._next = (step + 1, shape, self._thread.submit(self._make, step + 1, shape))
        return made
