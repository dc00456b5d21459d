"""A MIL trial on features in memory, and prediction. Knows neither Ray nor MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cytoray.errors import raise_problems
from cytoray.mil.base import Aggregator
from cytoray.mil.config import MILConfig
from cytoray.mil.packing import PackedBags, pack, split_bags
from cytoray.mil.trial import (
    MILResult,
    OnEpoch,
    Trial,
    aggregator_of,
    check_labels,
    cpu_copy,
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
        label: in 0..C-1.
    """

    slide_id: str
    features: np.ndarray | Tensor
    label: int


@dataclass(frozen=True)
class Predictions:
    """What a head says about bags.

    Attributes:
        logits: (B, C) float32.
        probabilities: (B, C) float64, rows sum to 1.
        attention: (N_i,) float32 for each bag, sums to 1.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    attention: list[np.ndarray]


def train_frozen(
    config: MILConfig,
    train_bags: Sequence[LabelledBag],
    val_bags: Sequence[LabelledBag],
    num_classes: int,
    on_epoch: OnEpoch | None = None,
    *,
    device: torch.device | str = "cpu",
) -> MILResult:
    """Train an aggregator on features in memory; the same config and bags give the same result.

    Args:
        config: the trial; its LoRA fields do not matter here.
        train_bags, val_bags: at least one each, two classes among the training bags.
        num_classes: C.
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
        optimiser = torch.optim.AdamW(
            aggregator.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )

        def batches(epoch: int) -> Iterator[tuple[PackedBags, Tensor]]:
            rng = np.random.default_rng((config.seed, epoch))
            for chosen in epoch_order(len(train_bags), config.batch_bags, rng):
                bags = [_sampled(train_bags[i].features, config.max_instances, rng) for i in chosen]
                yield pack(bags).to(device), torch.from_numpy(train_labels[chosen]).to(device)

        trial = Trial(
            config,
            aggregator,
            optimiser,
            train_labels,
            val_labels,
            batches,
            val_logits=lambda: predict(aggregator, [bag.features for bag in val_bags]).logits,
            snapshot=lambda: {"state_dict": cpu_copy(aggregator.state_dict())},
        )
        return trial.run(MILResult(config, in_dim, num_classes), on_epoch)


def check_features(bags: Sequence[LabelledBag]) -> int:
    """The common width D of the bags.

    Raises:
        InputError: names every bag that is empty, not 2-D, of another width, or holds NaN.
    """
    width, problems = bags[0].features.shape[-1], []
    for bag in bags:
        features = torch.as_tensor(bag.features)
        if features.ndim != 2 or features.shape[0] == 0 or features.shape[1] != width:
            shape = tuple(features.shape)
            problems.append(f"bag {bag.slide_id}: shape {shape}, expected (N >= 1, {width})")
        elif not bool(torch.isfinite(features).all()):
            problems.append(f"bag {bag.slide_id}: features hold NaN or infinity; embed it again")
    raise_problems("these bags cannot be used:", problems)
    return width


def epoch_order(count: int, batch: int, rng: np.random.Generator) -> list[np.ndarray]:
    """A shuffled pass over `count` bags in batches of `batch`."""
    order = rng.permutation(count)
    return [order[start : start + batch] for start in range(0, count, batch)]


def _sampled(features: np.ndarray | Tensor, limit: int, rng: np.random.Generator):
    """At most `limit` instances of a bag, in their order."""
    if features.shape[0] <= limit:
        return features
    return features[np.sort(rng.choice(features.shape[0], limit, replace=False))]


@torch.no_grad()
def predict(aggregator: Aggregator, bags: Iterable[np.ndarray | Tensor]) -> Predictions:
    """Predict bags of features; they may be read as they are asked for.

    Args:
        aggregator: stays on its device; evaluation mode is used and the old mode restored.
        bags: features (N_i, D) each.

    Raises:
        InputError: an empty bag or a width that is not the aggregator's.
    """
    device, was_training = next(aggregator.parameters()).device, aggregator.training
    aggregator.eval()
    logits, attention = [], []
    for group in _groups(bags):
        packed = pack(group)
        output = aggregator(packed.features.to(device), packed.offsets.to(device))
        logits.append(output.logits.float().cpu().numpy())
        parts = split_bags(output.attention.float().cpu(), packed.offsets)
        attention.extend(part.numpy().copy() for part in parts)
    aggregator.train(was_training)
    merged = np.concatenate(logits) if logits else np.zeros((0, aggregator.num_classes), np.float32)
    return Predictions(merged, softmax(merged), attention)


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
