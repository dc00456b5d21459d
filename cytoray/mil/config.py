"""What one MIL trial is: aggregator, adaptation and training, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cytoray.errors import choose, raise_problems
from cytoray.mil.aggregators import AGGREGATORS
from cytoray.mil.base import options_of
from cytoray.models.lora import TARGETS
from cytoray.precision import PRECISIONS

WATCHED = ("auc", "loss")


@dataclass(frozen=True, kw_only=True)
class MILConfig:
    """One MIL trial.

    Attributes:
        aggregator: a key of `AGGREGATORS`.
        options: the aggregator's own keyword options, besides dropout.
        dropout: of the aggregator.
        lr: of the aggregator.
        weight_decay: of the aggregator.
        betas: of AdamW on the aggregator; default: the aggregator's own.
        epochs: at most.
        patience: stop after so many epochs without a better validation (0: never).
        patience_on: what `patience` waits for: `auc` (on a tie, the loss) or `loss`.
        batch_bags: bags a step.
        max_instances: instances of a bag used in a training step, drawn anew each epoch.
        instance_dropout: share of a bag's instances left out of a training step, at random.
        warmup_share: share of all steps with rising learning rate, cosine to `min_lr` afterwards.
        min_lr: where the cosine ends.
        clip_grad: largest gradient norm (0: no limit).
        class_weighting: weigh classes by their inverse frequency in the training bags.
        balanced_sampling: instead, draw bags so that the classes come equally often.
        seed: of initialisation, order, sampling and dropout.
        lora_rank: rank of the encoder's adaptation; 0 leaves the encoder as it is.
        lora_targets: any of q, k, v, o, mlp.
        lora_blocks: adapt the last so many blocks of the encoder; 0: all. What lies below them is
            frozen and can be computed once for many trials.
        lora_alpha: scale of the update, alpha / sqrt(rank).
        lora_dropout: on the input of A.
        lora_lr: of A and B.
        lora_weight_decay: of A and B.
        tiles_per_bag: tiles of a bag that go through the encoder in a LoRA training step.
        eval_tiles: tiles of a bag that are embedded to evaluate a LoRA trial, evenly spread.
        batch_tiles: tiles a forward when embedding without gradient.
        warm_start_epochs: epochs on frozen features before LoRA starts (0: none).
        augment: flip and rotate LoRA training tiles.
        gradient_checkpointing: trade time for memory in the encoder.
        precision: of the encoder in a LoRA trial, where auto is bf16 if the device has it in
            hardware, else fp32; and of the aggregator's training steps, where auto is fp32.
            Weights, softmax and loss are fp32.
    """

    aggregator: str = "abmil"
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    dropout: float = 0.25
    lr: float = 5e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] | None = None
    epochs: int = 50
    patience: int = 10
    patience_on: str = "auc"
    batch_bags: int = 8
    max_instances: int = 4096
    instance_dropout: float = 0.0
    warmup_share: float = 0.05
    min_lr: float = 1e-6
    clip_grad: float = 5.0
    class_weighting: bool = True
    balanced_sampling: bool = False
    seed: int = 0
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ("q", "v")
    lora_blocks: int = 0
    lora_alpha: float = 1.0
    lora_dropout: float = 0.25
    lora_lr: float = 1e-3
    lora_weight_decay: float = 1e-2
    tiles_per_bag: int = 32
    eval_tiles: int = 512
    batch_tiles: int = 128
    warm_start_epochs: int = 10
    augment: bool = True
    gradient_checkpointing: bool = False
    precision: str = "auto"

    @classmethod
    def published(cls, aggregator: str, **changes: Any) -> MILConfig:
        """The training settings that an aggregator was published with, `changes` applied.

        Raises:
            InputError: an unknown aggregator, or settings that do not fit.
        """
        kind = AGGREGATORS[choose("aggregator", aggregator, AGGREGATORS)]
        return cls(**{"aggregator": aggregator, **kind.optimizer_defaults, **changes})

    @property
    def adam_betas(self) -> tuple[float, float]:
        """`betas`, or the aggregator's own."""
        own = AGGREGATORS[self.aggregator].optimizer_defaults.get("betas", (0.9, 0.999))
        return self.betas or own

    def __post_init__(self) -> None:
        problems = [*self._choice_problems(), *self._number_problems()]
        raise_problems("the MIL trial's config does not fit:", problems)

    def _choice_problems(self) -> list[str]:
        problems = []
        if self.aggregator not in AGGREGATORS:
            problems.append(
                f"aggregator {self.aggregator!r} is unknown; valid: {', '.join(AGGREGATORS)}"
            )
        else:
            valid = [n for n in options_of(AGGREGATORS[self.aggregator]) if n != "dropout"]
            problems += [
                f"options.{name} is not one of {self.aggregator}'s; valid: {', '.join(valid)}"
                for name in self.options
                if name not in valid
            ]
        if self.precision not in PRECISIONS:
            problems.append(f"precision {self.precision!r}; valid: {', '.join(PRECISIONS)}")
        if self.patience_on not in WATCHED:
            problems.append(f"patience_on {self.patience_on!r}; valid: {', '.join(WATCHED)}")
        wrong = [target for target in self.lora_targets if target not in TARGETS]
        if wrong or not self.lora_targets:
            problems.append(f"lora_targets {self.lora_targets}; any of {', '.join(TARGETS)}")
        return problems

    def _number_problems(self) -> list[str]:
        at_least_one = ("epochs", "batch_bags", "max_instances", "tiles_per_bag", "eval_tiles")
        problems = [
            f"{name} is {getattr(self, name)}; it must be 1 or more"
            for name in (*at_least_one, "batch_tiles")
            if getattr(self, name) < 1
        ]
        not_negative = ("patience", "weight_decay", "lora_weight_decay", "min_lr", "clip_grad")
        problems += [
            f"{name} is {getattr(self, name)}; it must be 0 or more"
            for name in (*not_negative, "seed", "lora_rank", "lora_blocks", "warm_start_epochs")
            if getattr(self, name) < 0
        ]
        problems += [
            f"{name} is {getattr(self, name)}; it must be above 0"
            for name in ("lr", "lora_lr", "lora_alpha")
            if not getattr(self, name) > 0
        ]
        problems += [
            f"{name} is {getattr(self, name)}; it must be from 0 to below 1"
            for name in ("dropout", "instance_dropout", "lora_dropout", "warmup_share")
            if not 0 <= getattr(self, name) < 1
        ]
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas are {self.betas}; both must be from 0 to below 1")
        return problems
