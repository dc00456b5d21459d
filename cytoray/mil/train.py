"""A MIL trial on features in memory, and prediction. Knows neither Ray nor MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cytoray.errors import raise_problems
from cytoray.mil.adamw import AdamW
from cytoray.mil.base import Aggregator
from cytoray.mil.config import MILConfig
from cytoray.mil.packing import PackedBags, pack, split_bags
from cytoray.mil.trial import (
    Batch,
    Classes,
    MILResult,
    OnEpoch,
    Trial,
    aggregator_of,
    check_labels,
    cpu_copy,
    sampling_weights,
    seeded,
    softmax,
)

PREDICT_INSTANCES = 65_536


@dataclass(frozen=True)
class LabelledBag:
    """A slide's features and its label.

    Attributes:
        slide_id: names the bag in messages.
        features: (N, D) float16 or float32, numpy or torch.
        label: in 0..C-1; or one for each task, -1 where missing.
        coarse: (M, D) the slide at a second, coarser scale, for an aggregator of two scales.
    """

    slide_id: str
    features: np.ndarray | Tensor
    label: int | tuple[int, ...]
    coarse: np.ndarray | Tensor | None = None


@dataclass(frozen=True)
class Predictions:
    """What a head says about bags.

    Attributes:
        logits: (B, C) float32, of the first task.
        probabilities: (B, C) float64, rows sum to 1, of the first task.
        attention: (N_i,) float32 for each bag, sums to 1.
        task_logits: (B, C_i) of each task.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    attention: list[np.ndarray]
    task_logits: tuple[np.ndarray, ...] = ()

    @property
    def task_probabilities(self) -> tuple[np.ndarray, ...]:
        """(B, C_i) float64 of each task, rows sum to 1."""
        return tuple(softmax(logits) for logits in self.task_logits)


def train_frozen(
    config: MILConfig,
    train_bags: Sequence[LabelledBag],
    val_bags: Sequence[LabelledBag],
    num_classes: Classes,
    on_epoch: OnEpoch | None = None,
    *,
    device: torch.device | str = "cpu",
) -> MILResult:
    """Train an aggregator on features in memory; the same config and bags give the same result.

    Args:
        config: the trial; its LoRA fields do not matter here.
        train_bags, val_bags: at least one each, two classes among the training bags.
        num_classes: C, or one C for each of several tasks.
        on_epoch: called with each epoch's record; a true answer stops the trial.
        device: to train on.

    Returns:
        The epoch with the best validation AUC (on a tie, the lowest validation loss).

    Raises:
        InputError: labels or features that do not fit (every such bag is named), or a loss that
            is not finite.
    """
    device = torch.device(device)
    labels = [bag.label for bag in train_bags], [bag.label for bag in val_bags]
    train_labels, val_labels = check_labels(*labels, num_classes)
    in_dim = check_features([*train_bags, *val_bags])
    with seeded(config.seed, device):
        aggregator = aggregator_of(config, in_dim, num_classes).to(device)
        optimiser = AdamW([parameter_group(aggregator, config)])
        scales = aggregator.num_scales

        def batches(epoch: int) -> Iterator[Batch]:
            rng = np.random.default_rng((config.seed, epoch))
            for chosen in epoch_order(train_labels, config, rng):
                bags = [train_bags[i] for i in chosen]
                fine, coarse = _packed_scales(bags, config, scales, rng)
                labels = torch.from_numpy(train_labels[chosen]).to(device)
                yield Batch(fine.to(device), labels, coarse.to(device) if coarse else None)

        def val_logits() -> tuple[np.ndarray, ...]:
            coarse = _coarse_views(val_bags) if scales == 2 else None
            return predict(aggregator, [bag.features for bag in val_bags], coarse).task_logits

        trial = Trial(
            config,
            aggregator,
            optimiser,
            train_labels,
            val_labels,
            batches,
            val_logits,
            snapshot=lambda: {"state_dict": cpu_copy(aggregator.state_dict())},
        )
        return trial.run(MILResult(config, in_dim, num_classes), on_epoch)


def parameter_group(aggregator: Aggregator, config: MILConfig) -> dict[str, Any]:
    """The aggregator's parameters as `AdamW` takes them."""
    return {
        "params": list(aggregator.parameters()),
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "betas": config.adam_betas,
    }


def check_features(bags: Sequence[LabelledBag]) -> int:
    """The common width D of the bags.

    Raises:
        InputError: names every bag that is empty, not 2-D, of another width, or holds NaN.
    """
    width, problems = bags[0].features.shape[-1], []
    views = [(bag, bag.features) for bag in bags]
    views += [(bag, bag.coarse) for bag in bags if bag.coarse is not None]
    for bag, view in views:
        if view.ndim != 2 or view.shape[0] == 0 or view.shape[1] != width:
            shape = tuple(view.shape)
            problems.append(f"bag {bag.slide_id}: shape {shape}, expected (N >= 1, {width})")
        elif not (view.isfinite() if isinstance(view, Tensor) else np.isfinite(view)).all():
            problems.append(f"bag {bag.slide_id}: features hold NaN or infinity; embed it again")
    raise_problems("these bags cannot be used:", problems)
    return width


def epoch_order(
    labels: np.ndarray, config: MILConfig, rng: np.random.Generator
) -> list[np.ndarray]:
    """Batches of bags: a shuffled pass, or as many draws with the classes equally often.

    Args:
        labels: (n,) or (n, tasks) of the training bags.
        config: says the batch, and whether sampling is balanced.
        rng: of the order.
    """
    count, batch = len(labels), config.batch_bags
    if config.balanced_sampling:
        order = rng.choice(count, count, p=sampling_weights(labels))
    else:
        order = rng.permutation(count)
    return [order[start : start + batch] for start in range(0, count, batch)]


def _coarse_views(bags: Sequence[LabelledBag]) -> list[np.ndarray | Tensor] | None:
    """The second scale of the bags, or None if they have none.

    Raises:
        InputError: some have one and some do not.
    """
    lacking = [bag.slide_id for bag in bags if bag.coarse is None]
    if len(lacking) == len(bags):
        return None
    raise_problems(
        "give every bag a coarse view, or none:", [f"bag {name} has none" for name in lacking]
    )
    return [bag.coarse for bag in bags if bag.coarse is not None]


def _packed_scales(
    bags: Sequence[LabelledBag], config: MILConfig, num_scales: int, rng: np.random.Generator
) -> tuple[PackedBags, PackedBags | None]:
    """What a training step sees of each bag, packed, at one scale or two."""
    limits = config.max_instances, config.instance_dropout
    fine = pack([sampled(bag.features, *limits, rng) for bag in bags])
    coarse = _coarse_views(bags) if num_scales == 2 else None
    return fine, pack([sampled(view, *limits, rng) for view in coarse]) if coarse else None


def sampled(
    features: np.ndarray | Tensor, limit: int, left_out: float, rng: np.random.Generator
) -> np.ndarray | Tensor:
    """Some instances of a bag, in their order: all but a share, at most `limit`, at least one.

    Args:
        features: (N, D).
        limit: instances at most.
        left_out: share to leave out, 0 to below 1.
        rng: of the draw.
    """
    count = features.shape[0]
    kept = max(1, min(limit, count - round(left_out * count)))
    if kept == count:
        return features
    return features[np.sort(rng.choice(count, kept, replace=False))]


@torch.no_grad()
def predict(
    aggregator: Aggregator,
    bags: Iterable[np.ndarray | Tensor],
    coarse: Iterable[np.ndarray | Tensor] | None = None,
) -> Predictions:
    """Predict bags of features; they may be read as they are asked for.

    Args:
        aggregator: stays on its device; evaluation mode is used and the old mode restored.
        bags: features (N_i, D) each.
        coarse: the same bags at a second scale, in the same order, for an aggregator of two.

    Raises:
        InputError: an empty bag or a width that is not the aggregator's.
    """
    device, was_training = next(aggregator.parameters()).device, aggregator.training
    aggregator.eval()
    classes = aggregator.task_classes
    logits = [[np.zeros((0, count), np.float32)] for count in classes]
    attention, views = [], iter(coarse) if coarse is not None else None
    for group in _groups(bags):
        packed = pack(group)
        second = pack(list(islice(views, len(group)))).to(device) if views else None
        output = aggregator(packed.features.to(device), packed.offsets.to(device), second)
        for parts, task_logits in zip(logits, output.task_logits, strict=True):
            parts.append(task_logits.float().cpu().numpy())
        of_bags = split_bags(output.attention.float().cpu(), packed.offsets)
        attention.extend(part.numpy().copy() for part in of_bags)
    aggregator.train(was_training)
    merged = tuple(np.concatenate(parts) for parts in logits)
    return Predictions(merged[0], softmax(merged[0]), attention, merged)


def _groups(bags: Iterable[np.ndarray | Tensor]) -> Iterator[list[np.ndarray | Tensor]]:
    """Bags in groups of at most `PREDICT_INSTANCES` instances (a larger bag goes alone)."""
    group, size = [], 0
    for bag in bags:
        if group and size + len(bag) > PREDICT_INSTANCES:
            yield group
            group, size = [], 0
        group.append(bag)
        size += len(bag)
    if group:
        yield group
