"""Training one trial: a head on frozen features, or an encoder (LoRA or whole) with its head.

Shapes: N images, M asked for, D width of the features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytoray.errors import InputError
from cytoray.evaluation import CELL_METRICS, evaluate_scores
from cytoray.evaluation.few_shot import draw_share, draw_shots
from cytoray.finetune.adapters import Adapter, adapt, adapter_state, load_adapter_state
from cytoray.finetune.augment import AUGMENTATIONS
from cytoray.finetune.config import CellTrial, TrainConfig
from cytoray.mil.trial import cpu_copy, seeded
from cytoray.models.encoder import Encoder
from cytoray.models.lora import set_lora_training
from cytoray.precision import autocast

OnEvaluation = Callable[[dict[str, float]], Any]


class CellClassifier(nn.Module):
    """An encoder (or none, for features) and a linear head.

    Args:
        encoder: images to features; None where features come in.
        head: features (B, D) to logits (B, C).
    """

    def __init__(self, encoder: Encoder | None, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits float32 (B, C) of images (as `Encoder.forward` takes them) or features (B, D)."""
        features = inputs.float() if self.encoder is None else self.encoder(inputs)
        return self.head(features).float()

    @torch.no_grad()
    def probabilities(
        self, inputs: np.ndarray, index: np.ndarray, *, batch: int = 128, precision: str = "auto"
    ) -> np.ndarray:
        """Class probabilities of some of the inputs: (M, C) float64; leaves evaluation mode on."""
        self.eval()
        device = self.head.weight.device
        parts = []
        for start in range(0, len(index), batch):
            chosen = torch.from_numpy(np.ascontiguousarray(inputs[index[start : start + batch]]))
            with autocast(precision, device):
                parts.append(self(chosen.to(device)).double().softmax(1).cpu().numpy())
        return np.concatenate(parts)


@dataclass
class TrainedCells:
    """What training has made.

    Attributes:
        adapter_state: of the encoder, see `adapter_state`; empty for a linear head.
        head_state: weight (C, D) and bias (C,).
        val: metrics on the validation part, by name, with `loss`.
        best_step: of the state kept.
        history: a record for each evaluation: step, loss, val_accuracy, val_loss, lr.
        num_images: images it was trained on.
        num_trained: parameters that were trained.
        probabilities: (M, C) of the images asked for.
    """

    adapter_state: dict[str, Tensor]
    head_state: dict[str, Tensor]
    val: dict[str, float]
    best_step: int
    history: list[dict[str, float]]
    num_images: int
    num_trained: int
    probabilities: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))


def draw_examples(
    trial: CellTrial, labels: np.ndarray, groups: np.ndarray, pool: np.ndarray
) -> np.ndarray:
    """The images a trial learns from: indices, a part of `pool` (n,).

    Args:
        trial: says how many, and the seed.
        labels: (N,).
        groups: (N,).
        pool: the training part.

    Raises:
        InputError: a class with fewer images than shots.
    """
    if trial.shots:
        return pool[draw_shots(labels[pool], groups[pool], trial.shots, trial.seed)]
    return pool[draw_share(labels[pool], trial.share, trial.seed)]


def train_cells(
    trial: CellTrial,
    inputs: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    val: np.ndarray,
    asked: np.ndarray,
    num_classes: int,
    *,
    encoder: Encoder | None = None,
    on_evaluation: OnEvaluation | None = None,
    device: torch.device | str = "cpu",
) -> TrainedCells:
    """Train a trial; the encoder given is not changed.

    Args:
        trial: what and how.
        inputs: features float (N, D) for a linear head, else pixels uint8 (N, S, S, 3).
        labels: (N,) int64 in 0..C-1.
        train: images to train on.
        val: images to choose the state by.
        asked: images to answer for once it is trained (M,).
        num_classes: C.
        encoder: what is adapted; None for a linear head.
        on_evaluation: called with each record of the history.
        device: to train on.

    Raises:
        InputError: a loss that is not finite.
    """
    device = torch.device(device)
    with seeded(trial.seed, device):
        adapted = None
        width = inputs.shape[-1]
        if trial.adapter.needs_pixels:
            assert encoder is not None, "an adapter needs the encoder"
            adapted, width = adapt(encoder, trial.adapter), encoder.embed_dim
        model = CellClassifier(adapted, nn.Linear(width, num_classes)).to(device)
        session = _Session(trial, model, inputs, labels, device)
        best, history = session.run(train, val, on_evaluation)
        _restore(model, trial.adapter, best.state)
        config = trial.train
        how = {"batch": config.eval_batch, "precision": config.precision}
        probabilities = model.probabilities(inputs, val, **how)
        metrics = evaluate_scores(labels[val], probabilities, CELL_METRICS)
        return TrainedCells(
            adapter_state=best.state["adapter"],
            head_state=best.state["head"],
            val=metrics | {"loss": best.loss},
            best_step=best.step,
            history=history,
            num_images=len(train),
            num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            probabilities=model.probabilities(inputs, asked, **how),
        )


@dataclass
class _Best:
    step: int
    accuracy: float
    loss: float
    state: dict[str, dict[str, Tensor]]


class _Session:
    """One training under way."""

    def __init__(
        self,
        trial: CellTrial,
        model: CellClassifier,
        inputs: np.ndarray,
        labels: np.ndarray,
        device: torch.device,
    ) -> None:
        self.trial, self.config, self.model = trial, trial.train, model
        self.inputs, self.labels, self.device = inputs, labels, device
        self.rng = np.random.default_rng((trial.seed, 1))
        self.augment = AUGMENTATIONS[self.config.augmentation]

    def run(
        self, train: np.ndarray, val: np.ndarray, on_evaluation: OnEvaluation | None
    ) -> tuple[_Best, list[dict[str, float]]]:
        """Train; the state kept, and the history."""
        config, total = self.config, self.config.num_steps(len(train), self.trial.shots)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=self.trial.lr, weight_decay=config.weight_decay)
        weights = class_weights(self.labels[train], self.model.head.out_features, config.balanced)
        weights = weights.to(self.device)
        looks = set(np.linspace(0, total, config.evaluations + 1).round().astype(int)[1:].tolist())
        batches = batch_stream(train, config.batch, self.rng)
        best: _Best | None = None
        history, losses = [], []
        for step in range(1, total + 1):
            lr = learning_rate(step - 1, total, self.trial.lr, config)
            for group in optimiser.param_groups:
                group["lr"] = lr
            losses.append(self._step(next(batches), optimiser, weights))
            if step not in looks:
                continue
            if not math.isfinite(losses[-1]):
                raise InputError(
                    f"the loss is not finite at step {step} with learning rate {self.trial.lr:g}; "
                    "take a lower one"
                )
            accuracy, val_loss = self._look(val)
            record = {
                "step": step, "loss": float(np.mean(losses)), "val_accuracy": accuracy,
                "val_loss": val_loss, "lr": lr,
            }  # fmt: skip
            history.append(record)
            losses = []
            if on_evaluation is not None:
                on_evaluation(record)
            better = best is None or (accuracy, -val_loss) > (best.accuracy, -best.loss)
            if better or config.select == "last":
                best = _Best(step, accuracy, val_loss, _snapshot(self.model, self.trial.adapter))
        assert best is not None, "the last step is always looked at"
        return best, history

    def _step(self, chosen: np.ndarray, optimiser: Any, weights: Tensor) -> float:
        self._training_mode()
        batch = torch.from_numpy(np.ascontiguousarray(self.inputs[chosen])).to(self.device)
        if self.model.encoder is not None:
            batch = self.augment(batch, self.rng)
        target = torch.from_numpy(self.labels[chosen]).to(self.device)
        with autocast(self.config.precision, self.device):
            logits = self.model(batch)
        loss = F.cross_entropy(logits, target, weight=weights)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    def _training_mode(self) -> None:
        """LoRA trains with its dropout and nothing else of the encoder in training mode."""
        kind = self.trial.adapter.kind
        self.model.train(kind == "full")
        if kind == "lora" and self.model.encoder is not None:
            set_lora_training(self.model.encoder.model, True)

    def _look(self, val: np.ndarray) -> tuple[float, float]:
        """Accuracy and mean log loss on the validation part."""
        answers = self.model.probabilities(
            self.inputs, val, batch=self.config.eval_batch, precision=self.config.precision
        )
        labels = self.labels[val]
        right = np.maximum(answers[np.arange(len(labels)), labels], 1e-12)
        return float((answers.argmax(1) == labels).mean()), float(-np.log(right).mean())


def _snapshot(model: CellClassifier, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    state = {} if model.encoder is None else adapter_state(model.encoder, adapter)
    return {"adapter": cpu_copy(state), "head": cpu_copy(model.head.state_dict())}


def _restore(model: CellClassifier, adapter: Adapter, state: dict[str, dict[str, Tensor]]) -> None:
    model.head.load_state_dict(state["head"])
    if model.encoder is not None:
        load_adapter_state(model.encoder, adapter, state["adapter"])


def batch_stream(indices: np.ndarray, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of `indices` without end, in a new order each time round; the last may be small."""
    while True:
        order = rng.permutation(indices)
        for start in range(0, len(order), batch):
            yield order[start : start + batch]


def learning_rate(step: int, total: int, peak: float, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from `peak` to `min_lr` over the steps that are left."""
    warmup = min(config.warmup_steps, total - 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    low = min(config.min_lr, peak)
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * share))


def class_weights(labels: np.ndarray, num_classes: int, balanced: bool) -> Tensor:
    """Weights of the classes in the loss (C,) float32: ones, or inverse frequency, mean 1."""
    if not balanced:
        return torch.ones(num_classes)
    counts = np.maximum(np.bincount(labels, minlength=num_classes), 1)
    weights = len(labels) / (num_classes * counts)
    return torch.from_numpy((weights / weights.mean()).astype(np.float32))
