"""The loop that frozen and LoRA trials share: batches of packed bags in, the best epoch out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cytoray.errors import InputError, raise_problems
from cytoray.evaluation.metrics import evaluate_scores
from cytoray.mil.adamw import AdamW
from cytoray.mil.aggregators import build_aggregator
from cytoray.mil.base import MISSING, Aggregator, task_classes_of
from cytoray.mil.config import MILConfig
from cytoray.mil.packing import PackedBags

OnEpoch = Callable[[dict[str, float]], "bool | None"]
Classes = int | Sequence[int]


class Batch(NamedTuple):
    """What one training step sees.

    Attributes:
        bags: packed; features may carry a graph.
        labels: (B,) int64, or (B, tasks) with -1 where missing.
        coarse: the same bags at a second scale, or None.
    """

    bags: PackedBags
    labels: Tensor
    coarse: PackedBags | None = None


Batches = Callable[[int], Iterator[Batch]]


@dataclass
class MILResult:
    """What a trial leaves behind.

    Attributes:
        config: the trial.
        in_dim: width D of the features.
        num_classes: C, or one C a task.
        state_dict: the aggregator of the best epoch, on the CPU.
        lora_state: the encoder's LoRA weights of the best epoch; empty without LoRA.
        best_epoch: best validation AUC, then lowest validation loss; 0 is the warm start.
        val_metrics: every metric on the validation bags, at the best epoch; of several tasks,
            the mean, and each task's own as `task<i>_<name>`.
        history: one record an epoch: epoch, train_loss, val_loss, val_auc, val_accuracy, lr.
    """

    config: MILConfig
    in_dim: int
    num_classes: Classes
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


def aggregator_of(config: MILConfig, in_dim: int, num_classes: Classes) -> Aggregator:
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
    train_labels: Sequence, val_labels: Sequence, num_classes: Classes
) -> tuple[np.ndarray, np.ndarray]:
    """Labels as int64 arrays: (n,), or (n, tasks) with -1 where a task has no label.

    Raises:
        InputError: no bag in a part, labels outside 0..C-1, one class only to train on, or a task
            without a labelled validation bag.
    """
    classes = task_classes_of(num_classes)
    parts, problems = {}, []
    for name, labels in (("training", train_labels), ("validation", val_labels)):
        widths = {len(np.atleast_1d(label)) for label in labels}
        if not len(labels):
            problems.append(f"there is no {name} bag")
        elif widths != {len(classes)}:
            problems.append(f"every {name} bag needs {len(classes)} labels, one a task")
        else:
            parts[name] = np.asarray(labels).reshape(len(labels), len(classes))
            problems += _label_problems(name, parts[name], classes)
    raise_problems("these bags cannot be trained on:", problems)
    train, val = (parts[name].astype(np.int64) for name in ("training", "validation"))
    return (train, val) if len(classes) > 1 else (train[:, 0], val[:, 0])


def _label_problems(name: str, labels: np.ndarray, classes: Sequence[int]) -> list[str]:
    problems, several = [], len(classes) > 1
    for task, (column, count) in enumerate(zip(labels.T, classes, strict=True)):
        where = f" of task {task}" if several else ""
        known = column[column != MISSING] if several else column
        if not np.isin(known, np.arange(count)).all():
            problems.append(f"{name} labels{where} must be whole numbers in 0..{count - 1}")
        elif not len(known):
            problems.append(f"no {name} bag has a label{where}")
        elif name == "training" and len(np.unique(known)) < 2:
            problems.append(f"all training bags have the same label{where}")
    return problems


def class_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Inverse class frequency, N / (C n_c): (C,) float32; 1 for a class without bags."""
    counts = np.bincount(labels, minlength=num_classes)
    weights = np.where(counts > 0, len(labels) / (num_classes * np.maximum(counts, 1)), 1.0)
    return torch.from_numpy(weights.astype(np.float32))


def sampling_weights(labels: np.ndarray) -> np.ndarray:
    """How often to draw each bag so that classes come equally often: (n,), summing to 1.

    Args:
        labels: (n,), or (n, tasks) with -1 where missing: the mean over a bag's tasks counts.
    """
    total, known = np.zeros(len(labels)), np.zeros(len(labels))
    for column in columns_of(labels):
        there = column >= 0
        counts = np.bincount(column[there])
        total[there] += there.sum() / (np.count_nonzero(counts) * counts[column[there]])
        known += there
    weights = np.divide(total, known, out=np.zeros(len(labels)), where=known > 0)
    return weights / weights.sum()


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
        train_labels, val_labels: (n,) int64, or (n, tasks).
        batches: epoch to packed bags with their labels; features may carry a graph.
        val_logits: evaluates all validation bags: (n, C) float of each task.
        snapshot: copies the state to keep if the epoch is the best.
    """

    config: MILConfig
    aggregator: Aggregator
    optimiser: AdamW
    train_labels: np.ndarray
    val_labels: np.ndarray
    batches: Batches
    val_logits: Callable[[], Sequence[np.ndarray]]
    snapshot: Callable[[], dict[str, dict[str, Tensor]]]

    def __post_init__(self) -> None:
        config = self.config
        self.device = next(self.aggregator.parameters()).device
        self.weights = [
            class_weights(column[column >= 0], classes).to(self.device)
            if config.class_weighting and not config.balanced_sampling
            else torch.ones(classes, device=self.device)
            for column, classes in zip(
                columns_of(self.train_labels), self.aggregator.task_classes, strict=True
            )
        ]
        steps = config.epochs * math.ceil(len(self.train_labels) / config.batch_bags)
        floors = [min(1.0, config.min_lr / group["lr"]) for group in self.optimiser.param_groups]
        self.factors = [partial(lr_factor, steps, config.warmup_share, floor) for floor in floors]
        self.base_lrs = [group["lr"] for group in self.optimiser.param_groups]
        self.step = 0
        self._set_lrs()

    def _set_lrs(self) -> None:
        """The learning rates of this step."""
        parts = zip(self.optimiser.param_groups, self.base_lrs, self.factors, strict=True)
        for group, base, factor in parts:
            group["lr"] = base * factor(self.step)

    def run(self, result: MILResult, on_epoch: OnEpoch | None, *, start: bool = False) -> MILResult:
        """Train; with `start`, the state before the first epoch counts as epoch 0."""
        best, waited = (-math.inf, -math.inf), 0
        lowest = math.inf
        for epoch in range(0 if start else 1, self.config.epochs + 1):
            lr = self.optimiser.param_groups[0]["lr"]
            train_loss = self._train_epoch(epoch) if epoch else math.nan
            record, metrics = self._evaluate()
            record = {"epoch": epoch, "train_loss": train_loss, **record, "lr": lr}
            result.history.append(record)
            auc = record["val_auc"] if math.isfinite(record["val_auc"]) else -math.inf
            better = (auc, -record["val_loss"]) > best
            watched = record["val_loss"] < lowest if self.config.patience_on == "loss" else better
            waited = 0 if watched else waited + 1
            lowest = min(lowest, record["val_loss"])
            if better:
                best = (auc, -record["val_loss"])
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
        total = torch.zeros((), device=self.device)
        for packed, labels, coarse in self.batches(epoch):
            with self._autocast():
                output = self.aggregator(packed.features, packed.offsets, coarse)
                terms = self.aggregator.loss(output, labels, self.weights)
                loss = torch.stack(list(terms.values())).sum()
            self.optimiser.zero_grad()
            loss.backward()
            if self.config.clip_grad:
                parameters = [p for g in self.optimiser.param_groups for p in g["params"]]
                nn.utils.clip_grad_norm_(parameters, self.config.clip_grad)
            self.optimiser.step()
            self.step += 1
            self._set_lrs()
            total += loss.detach() * len(labels)
        mean = float(total) / len(self.train_labels)
        if not math.isfinite(mean):
            raise InputError(f"the loss is {mean} in epoch {epoch}; lower lr or lora_lr")
        return mean

    def _autocast(self) -> torch.autocast:
        """Products of the aggregator in bf16 where that is asked for; `auto` keeps float32."""
        asked = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=asked)

    def _evaluate(self) -> tuple[dict[str, float], dict[str, float]]:
        self.aggregator.eval()
        losses, tables = [], []
        parts = zip(self.val_logits(), columns_of(self.val_labels), self.weights, strict=True)
        for logits, column, weight in parts:
            known = column >= 0
            labels, probabilities = column[known], softmax(logits[known])
            tables.append(evaluate_scores(labels, probabilities))
            weights = weight.cpu().numpy()[labels]
            chosen = probabilities[np.arange(len(labels)), labels]
            losses.append((weights * -np.log(np.maximum(chosen, 1e-12))).sum() / weights.sum())
        metrics = tables[0] if len(tables) == 1 else over_tasks(tables)
        record = {
            "val_loss": float(np.mean(losses)),
            "val_auc": metrics["auc"],
            "val_accuracy": metrics["accuracy"],
        }
        return record, metrics


def columns_of(labels: np.ndarray) -> list[np.ndarray]:
    """Labels (n,) or (n, tasks) as one (n,) a task."""
    return [labels] if labels.ndim == 1 else list(labels.T)


def over_tasks(tables: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the tasks where it is defined, then each task's own."""
    merged = {}
    for name in tables[0]:
        defined = [table[name] for table in tables if math.isfinite(table[name])]
        merged[name] = float(np.mean(defined)) if defined else math.nan
    for task, table in enumerate(tables):
        merged |= {f"task{task}_{name}": value for name, value in table.items()}
    return merged


def cpu_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that later steps cannot change."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
