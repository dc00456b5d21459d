"""What every aggregator is: packed bags in, bag logits and instance attention out.

Shapes: B bags, T instances of all bags together, D width, C classes of a task.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytoray.errors import InputError
from cytoray.mil.packing import PackedBags, bag_ids, check_packed

ClassWeight = Tensor | Sequence[Tensor] | None
MISSING = -1
"""The label of a bag that a task knows nothing about."""


@dataclass
class MILOutput:
    """What an aggregator says about a batch of bags.

    Attributes:
        logits: (B, C) float, of the first task.
        attention: (T,) float32 >= 0, detached; sums to 1 over each bag. How much of the bag's
            answer each instance carries; with several tasks, of the first task's answer.
        aux: further tensors the aggregator's own loss needs, by name.
        task_logits: (B, C_i) float of each task; `logits` is the first of them.
    """

    logits: Tensor
    attention: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)
    task_logits: tuple[Tensor, ...] = ()


def task_classes_of(num_classes: int | Sequence[int]) -> tuple[int, ...]:
    """Classes of each task, from C or from one C a task.

    Raises:
        InputError: no task, or fewer than two classes in one.
    """
    classes = (num_classes,) if isinstance(num_classes, int) else tuple(num_classes)
    if not classes or min(classes) < 2:
        raise InputError(f"an aggregator needs at least 2 classes for each task, got {num_classes}")
    return classes


def masked_cross_entropy(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over the bags that have a label; 0 (with a graph) where none has.

    Args:
        logits: (B, C).
        labels: (B,) int64 in 0..C-1, or -1 for a missing label.
        class_weight: (C,) float, or None for equal weights.
    """
    logits = logits.float()
    if not bool((labels >= 0).any()):
        return logits.sum() * 0.0
    return F.cross_entropy(logits, labels, class_weight, ignore_index=MISSING)


class Aggregator(nn.Module, ABC):
    """Base of the MIL aggregators: subclasses implement `aggregate`, and `loss` where needed.

    Args:
        in_dim: width D of the instance features.
        num_classes: C, at least 2; or one C for each of several tasks.

    Attributes:
        optimizer_defaults: the published training settings, by field of `MILConfig`.
        multi_task: takes several tasks at once.
        num_scales: 2 where a second, coarser view of each bag is used.
        num_logits: sum of C over the tasks: the width that `aggregate` must give.
        cpu_instances: bags go through `aggregate` in groups of about so many instances on a CPU,
            where larger intermediate tensors leave the cache and are paid for page by page.
    """

    optimizer_defaults: ClassVar[Mapping[str, Any]] = {}
    multi_task: ClassVar[bool] = True
    num_scales: ClassVar[int] = 1
    cpu_instances: ClassVar[int] = 8192

    def __init__(self, in_dim: int, num_classes: int | Sequence[int]) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.task_classes = task_classes_of(num_classes)
        self.num_classes, self.num_logits = self.task_classes[0], sum(self.task_classes)
        if len(self.task_classes) > 1 and not self.multi_task:
            raise InputError(
                f"{type(self).__name__} learns one task at a time, got {len(self.task_classes)}; "
                "train one head a task, or use unicas"
            )

    def forward(
        self, features: Tensor, offsets: Tensor, coarse: PackedBags | None = None
    ) -> MILOutput:
        """Aggregate packed bags.

        Args:
            features: (T, D); float16 features are converted to the aggregator's precision.
            offsets: (B + 1,) int64, bag b is `features[offsets[b]:offsets[b + 1]]`.
            coarse: the same bags at a second, coarser scale, for aggregators of two scales; the
                others do without it.

        Raises:
            InputError: an empty bag, a width that is not `in_dim`, or other bags in `coarse`.
        """
        check_packed(features, offsets, self.in_dim)
        scales = [PackedBags(features, offsets)]
        if self.num_scales == 2 and coarse is not None:
            check_packed(coarse.features, coarse.offsets, self.in_dim)
            if len(coarse.offsets) != len(offsets):
                raise InputError(
                    f"{len(offsets) - 1} bags but {len(coarse.offsets) - 1} at the coarse scale"
                )
            scales.append(coarse)
        limit = self.cpu_instances if features.device.type == "cpu" else features.shape[0]
        groups = group_bags(offsets.tolist(), limit)
        output = join_outputs([self._aggregate_group(scales, *group) for group in groups])
        output.task_logits = output.logits.split(self.task_classes, dim=1)
        output.logits = output.task_logits[0]
        return output

    def _aggregate_group(self, scales: list[PackedBags], first: int, last: int) -> MILOutput:
        """Aggregate the bags `first` to `last` (not included) alone."""
        dtype, parts = next(self.parameters()).dtype, []
        for packed in scales:
            offsets = packed.offsets[first : last + 1]
            start, stop = int(offsets[0]), int(offsets[-1])
            parts.append(PackedBags(packed.features[start:stop].to(dtype), offsets - start))
        features, offsets = parts[0]
        ids = bag_ids(offsets, features.shape[0])
        if len(parts) == 2:
            return self.aggregate_scales(features, offsets, ids, parts[1])
        return self.aggregate(features, offsets, ids)

    @abstractmethod
    def aggregate(self, features: Tensor, offsets: Tensor, ids: Tensor) -> MILOutput:
        """The aggregator's maths on a checked batch; `ids` (T,) names each instance's bag.

        The logits are those of all tasks side by side, (B, num_logits). The first axis of every
        tensor in `aux` is bags, instances or parts of bags, in the order of the bags, so that
        groups of bags can be joined end to end; no tensor holds positions within the batch.
        """

    def aggregate_scales(
        self, features: Tensor, offsets: Tensor, ids: Tensor, coarse: PackedBags
    ) -> MILOutput:
        """`aggregate` with a second scale of the bags; only where `num_scales` is 2."""
        return self.aggregate(features, offsets, ids)

    def loss(
        self, output: MILOutput, labels: Tensor, class_weight: ClassWeight = None
    ) -> dict[str, Tensor]:
        """The terms to minimise, already weighted: their sum is the training loss.

        Args:
            output: what `forward` returned.
            labels: (B,) int64 in 0..C-1, or (B, tasks); -1 is a missing label and gives no loss.
            class_weight: (C,) float (one for each task if several), or None for equal weights.
        """
        return {"bag": task_cross_entropy(output.task_logits, labels, class_weight)}


def task_cross_entropy(
    task_logits: Sequence[Tensor],
    labels: Tensor,
    class_weight: ClassWeight = None,
) -> Tensor:
    """Mean over the tasks of `masked_cross_entropy`.

    Args:
        task_logits: (B, C_i) of each task.
        labels: (B,) or (B, tasks) int64, -1 where missing.
        class_weight: (C,), one (C_i,) a task, or None.

    Raises:
        InputError: as many columns of labels as tasks are needed.
    """
    columns = labels[:, None] if labels.ndim == 1 else labels
    if columns.shape[1] != len(task_logits):
        raise InputError(f"labels of {columns.shape[1]} tasks for a head of {len(task_logits)}")
    weights = [class_weight] if isinstance(class_weight, Tensor) else class_weight
    terms = [
        masked_cross_entropy(logits, columns[:, task], weights[task] if weights else None)
        for task, logits in enumerate(task_logits)
    ]
    return terms[0] if len(terms) == 1 else torch.stack(terms).mean()


def group_bags(bounds: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Runs of bags (first, one past the last) of at most `limit` instances; a larger bag is alone.

    Args:
        bounds: B + 1 offsets.
        limit: instances.
    """
    groups, first = [], 0
    for bag in range(1, len(bounds)):
        if bag - first > 1 and bounds[bag] - bounds[first] > limit:
            groups.append((first, bag - 1))
            first = bag - 1
    return [*groups, (first, len(bounds) - 1)]


def join_outputs(outputs: Sequence[MILOutput]) -> MILOutput:
    """The outputs of groups of bags as one."""
    if len(outputs) == 1:
        return outputs[0]
    return MILOutput(
        torch.cat([output.logits for output in outputs]),
        torch.cat([output.attention for output in outputs]),
        {key: torch.cat([output.aux[key] for output in outputs]) for key in outputs[0].aux},
    )


def options_of(factory: Callable[..., Aggregator]) -> tuple[str, ...]:
    """The keyword options an aggregator takes besides in_dim and num_classes."""
    names = inspect.signature(factory).parameters
    return tuple(name for name in names if name not in ("in_dim", "num_classes"))
