"""One trial of fine-tuning: which encoder, what of it is trained, on how much, and how."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cytoray.config import to_plain
from cytoray.errors import raise_problems
from cytoray.finetune.adapters import Adapter
from cytoray.finetune.augment import AUGMENTATIONS
from cytoray.precision import PRECISIONS

SELECTIONS = ("best", "last")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a head, or an encoder with its head, is trained (AdamW, warm-up, cosine).

    Attributes:
        steps_per_shot: few-shot: steps for each example of a class (50 shots: 50 times as many).
        epochs: of trials on a share of the data.
        warmup_steps: of linear warm-up, in front of the steps above.
        batch: images a step.
        weight_decay: of AdamW.
        min_lr: where the cosine ends.
        augmentation: one of `AUGMENTATIONS`; images only, frozen features are computed once.
        balanced: weigh classes by their inverse frequency in the loss.
        select: `best`: the state with the best validation accuracy; `last`: that of the last step.
        evaluations: how often the validation part is looked at.
        eval_batch: images a forward without gradient.
        precision: `auto` (bf16 where the device has it in hardware), `fp32` or `bf16`.

    Raises:
        InputError: values that cannot be; all problems.
    """

    steps_per_shot: int = 100
    epochs: int = 20
    warmup_steps: int = 50
    batch: int = 32
    weight_decay: float = 1e-2
    min_lr: float = 1e-6
    augmentation: str = "crops"
    balanced: bool = False
    select: str = "best"
    evaluations: int = 5
    eval_batch: int = 128
    precision: str = "auto"

    def __post_init__(self) -> None:
        least = {"steps_per_shot": 1, "epochs": 1, "warmup_steps": 0, "batch": 1}
        least |= {"evaluations": 1, "eval_batch": 1}
        problems = [
            f"{name} must be {low} or more, not {getattr(self, name)}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        choices = {"augmentation": AUGMENTATIONS, "select": SELECTIONS, "precision": PRECISIONS}
        problems += [
            f"{name} {getattr(self, name)!r} is none of {', '.join(valid)}"
            for name, valid in choices.items()
            if getattr(self, name) not in valid
        ]
        if self.weight_decay < 0 or self.min_lr < 0:
            problems.append("weight_decay and min_lr must be 0 or more")
        raise_problems("this training cannot be run:", problems)

    def num_steps(self, num_images: int, shots: int) -> int:
        """Steps of a trial, warm-up included."""
        steps = self.steps_per_shot * shots
        if not shots:
            steps = self.epochs * math.ceil(num_images / self.batch)
        return self.warmup_steps + steps


@dataclass(frozen=True, kw_only=True)
class CellTrial:
    """One trial.

    Attributes:
        encoder: any form `load_encoder` takes.
        adapter: what is trained.
        shots: examples of each class; 0: a share of the data.
        share: of the training images, when `shots` is 0.
        lr: peak learning rate.
        seed: of the draw of examples, the weights and the order.
        train: everything else.
    """

    encoder: str
    adapter: Adapter
    shots: int = 0
    share: float = 1.0
    lr: float = 1e-3
    seed: int = 0
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def amount(self) -> str:
        """How much it learns from: `16 shots`, `70 %`."""
        return f"{self.shots} shots" if self.shots else f"{100 * self.share:g} %"


def grid_trials(
    encoders: Sequence[str],
    adapters: Sequence[Adapter],
    amounts: Sequence[tuple[int, float]],
    lrs: Sequence[float],
    seeds: Sequence[int],
    train: TrainConfig,
) -> list[CellTrial]:
    """Every combination once.

    Args:
        encoders: see `CellTrial`.
        adapters: what is trained.
        amounts: (shots, share) each; shots 0 means the share.
        lrs: learning rates.
        seeds: of each.
        train: everything else.
    """
    grid = itertools.product(adapters, amounts, encoders, lrs, seeds)
    trials = [
        CellTrial(
            encoder=encoder,
            adapter=adapter,
            shots=shots,
            share=share,
            lr=lr,
            seed=seed,
            train=train,
        )
        for adapter, (shots, share), encoder, lr, seed in grid
    ]
    return list({json.dumps(to_plain(trial), sort_keys=True): trial for trial in trials}.values())
