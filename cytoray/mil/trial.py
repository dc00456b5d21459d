"""The loop that frozen and LoRA trials share: batches of packed bags in, the best epoch out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cytoray.errors import InputError, raise_problems
from cytoray.evaluation.metrics import evaluate_scores
from cytoray.mil.aggregators import build_aggregator
from cytoray.mil.base import Aggregator
from cytoray.mil.config import MILConfig
from cytoray.mil.packing import PackedBags

OnEpoch = Callable[[dict[str, float]], "bool | None"]
Batches = Callable[[int], Iterator[tuple[PackedBags, Tensor]]]


@dataclass
class MILResult:
    """What a trial leaves behind.

    Attributes:
        config: the trial.
        in_dim: width D of the features.
        num_classes: C.
        state_dict: the aggregator of the best epoch, on the CPU.
        lora_state: the encoder's LoRA weights of the best epoch; empty without LoRA.
        best_epoch: best validation AUC, then lowest validation loss; 0 is the warm start.
        val_metrics: every metric on the validation bags, at the best epoch.
        history: one record an epoch: epoch, train_loss, val_loss, val_auc, val_accuracy, lr.
    """

    config: MILConfig
    in_dim: int
    num_classes: int
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    lora_state: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = -1
    val_metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    def build(self) -> Aggregator:
        """The best epoch's aggregator, in evaluation mode."""
        aggregator = aggregator_of(self.config, self.in_dim, self.num_classes)
        aggregator.load_state_dict(self.state_dict)
        return aggregator.eval()


def aggregator_of(config: MILConfig, in_dim: int, num_classes: int) -> Aggregator:
    """The aggregator a config names."""
    options: dict[str, Any] = {"dropout": config.dropout, **config.options}
    return build_aggregator(config.aggregator, in_dim, num_classes, **options)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block and leave the caller's random state as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def check_labels(
    train_labels: Sequence[int], val_labels: Sequence[int], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels as int64 arrays.

    Raises:
        InputError: no bag in a part, labels outside 0..C-1, or one class only to train on.
    """
    parts = {"training": np.asarray(train_labels), "validation": np.asarray(val_labels)}
    problems = []
    for name, labels in parts.items():
        if not len(labels):
            problems.append(f"there is no {name} bag")
        elif not np.isin(labels, np.arange(num_classes)).all():
            problems.append(f"{name} labels must be whole numbers in 0..{num_classes - 1}")
    if not problems and len(np.unique(parts["training"])) < 2:
        problems.append("all training bags have the same label")
    raise_problems("these bags cannot be trained on:", problems)
    return parts["training"].astype(np.int64), parts["validation"].astype(np.int64)


def class_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Inverse class frequency, N / (C n_c): (C,) float32; 1 for a class without bags."""
    counts = np.bincount(labels, minlength=num_classes)
    weights = np.where(counts > 0, len(labels) / (num_classes * np.maximum(counts, 1)), 1.0)
    return torch.from_numpy(weights.astype(np.float32))


def lr_factor(total: int, warmup_share: float, floor: float, step: int) -> float:
    """Share of the base learning rate at `step` of `total`: linear warm-up, cosine to `floor`."""
    warmup = round(total * warmup_share)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(1, total - warmup), 1.0)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Class probabilities (B, C) float64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@dataclass
class Trial:
    """A trial under way.

    Attributes:
        config: the trial.
        aggregator: being trained.
        optimiser: over the aggregator, and LoRA's parameters if any.
        train_labels, val_labels: (n,) int64.
        batches: epoch to packed bags with their labels; features may carry a graph.
        val_logits: evaluates all validation bags: (n, C) float.
        snapshot: copies the state to keep if the epoch is the best.
    """

    config: MILConfig
    aggregator: Aggregator
    optimiser: torch.optim.Optimizer
    train_labels: np.ndarray
    val_labels: np.ndarray
    batches: Batches
    val_logits: Callable[[], np.ndarray]
    snapshot: Callable[[], dict[str, dict[str, Tensor]]]

    def __post_init__(self) -> None:
        config, num_classes = self.config, self.aggregator.num_classes
        weights = class_weights(self.train_labels, num_classes)
        if not config.class_weighting:
            weights = torch.ones(num_classes)
        self.weights = weights.to(next(self.aggregator.parameters()).device)
        steps = config.epochs * math.ceil(len(self.train_labels) / config.batch_bags)
        floors = [min(1.0, config.min_lr / group["lr"]) for group in self.optimiser.param_groups]
        factors = [partial(lr_factor, steps, config.warmup_share, floor) for floor in floors]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, factors)

    def run(self, result: MILResult, on_epoch: OnEpoch | None, *, start: bool = False) -> MILResult:
        """Train; with `start`, the state before the first epoch counts as epoch 0."""
        best, waited = (-math.inf, -math.inf), 0
        for epoch in range(0 if start else 1, self.config.epochs + 1):
            lr = self.optimiser.param_groups[0]["lr"]
            train_loss = self._train_epoch(epoch) if epoch else math.nan
            record, metrics = self._evaluate()
            record = {"epoch": epoch, "train_loss": train_loss, **record, "lr": lr}
            result.history.append(record)
            auc = record["val_auc"] if math.isfinite(record["val_auc"]) else -math.inf
            waited += 1
            if (auc, -record["val_loss"]) > best:
                best, waited = (auc, -record["val_loss"]), 0
                result.best_epoch, result.val_metrics = epoch, metrics
                for name, state in self.snapshot().items():
                    setattr(result, name, state)
            stop = on_epoch(dict(record)) if on_epoch is not None else False
            if stop or (self.config.patience and waited >= self.config.patience):
                break
        return result

    def _train_epoch(self, epoch: int) -> float:
        """Mean training loss of the epoch, over bags."""
        self.aggregator.train()
        total = torch.zeros((), device=self.weights.device)
        for packed, labels in self.batches(epoch):
            output = self.aggregator(packed.features, packed.offsets)
            terms = self.aggregator.loss(output, labels, self.weights)
            loss = torch.stack(list(terms.values())).sum()
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if self.config.clip_grad:
                parameters = [p for g in self.optimiser.param_groups for p in g["params"]]
                nn.utils.clip_grad_norm_(parameters, self.config.clip_grad)
            self.optimiser.step()
            self.schedule.step()
            total += loss.detach() * len(labels)
        mean = float(total) / len(self.train_labels)
        if not math.isfinite(mean):
            raise InputError(f"the loss is {mean} in epoch {epoch}; lower lr or lora_lr")
        return mean

    def _evaluate(self) -> tuple[dict[str, float], dict[str, float]]:
        self.aggregator.eval()
        logits = self.val_logits()
        probabilities = softmax(logits)
        metrics = evaluate_scores(self.val_labels, probabilities)
        weights = self.weights.cpu().numpy()[self.val_labels]
        chosen = probabilities[np.arange(len(self.val_labels)), self.val_labels]
        loss = float((weights * -np.log(np.maximum(chosen, 1e-12))).sum() / weights.sum())
        record = {"val_loss": loss, "val_auc": metrics["auc"], "val_accuracy": metrics["accuracy"]}
        return record, metrics


def cpu_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that later steps cannot change."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
