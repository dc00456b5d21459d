"""Training of a tile encoder from slide labels by variational positive-unlabelled learning (LESS).

Every tile of a benign slide is benign: those are the labelled positives. A tile of another slide
may be either: those are unlabelled. The encoder learns log phi, the log-probability of benign.

Shapes: P tiles of a kind in a step, S tile side in pixels, D width of the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cytoray.errors import InputError, SlideError, raise_problems
from cytoray.io import atomic_path
from cytoray.mil.tiles import TileSource, turn_and_flip
from cytoray.mil.trial import cpu_copy, seeded
from cytoray.mil.vpu import MIXUP_ALPHA, MIXUP_WEIGHT, mix, variational_loss, vpu_loss
from cytoray.precision import autocast

KINDS = ("positive", "unlabelled")


@dataclass(frozen=True, kw_only=True)
class VPUConfig:
    """How an encoder learns from positive and unlabelled tiles.

    Attributes:
        epochs: passes of `steps_per_epoch`, each followed by a validation.
        steps_per_epoch: steps.
        batch_tiles: tiles of each kind in a step.
        val_tiles: tiles of each kind to choose the epoch by.
        lr: of Adam, on encoder and head.
        weight_decay: decoupled.
        betas: of Adam.
        mixup_alpha: of the Beta distribution of the mixtures.
        mixup_weight: of the term on the mixtures.
        augment: turn and flip training tiles.
        precision: of the encoder: `auto` (bf16 where the device has it in hardware),
            `fp32` or `bf16`.
        seed: of the draws and the head.
    """

    epochs: int = 10
    steps_per_epoch: int = 100
    batch_tiles: int = 64
    val_tiles: int = 1024
    lr: float = 3e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.5, 0.99)
    mixup_alpha: float = MIXUP_ALPHA
    mixup_weight: float = MIXUP_WEIGHT
    augment: bool = True
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; it must be 1 or more"
            for name in ("epochs", "steps_per_epoch", "batch_tiles", "val_tiles")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name} is {getattr(self, name)}; it must be above 0"
            for name in ("lr", "mixup_alpha")
            if not getattr(self, name) > 0
        ]
        if self.precision not in ("auto", "fp32", "bf16"):
            problems.append(f"precision {self.precision!r}; valid: auto, fp32, bf16")
        raise_problems("the VPU config does not fit:", problems)


@dataclass
class TilePool:
    """Tiles of the slides of one kind; a slide that cannot be read leaves it and is remembered.

    Attributes:
        source: see `TileSource`.
        slides: ids of the slides still used.
        bad: what was wrong with the others, by slide.
    """

    source: TileSource
    slides: list[str]
    bad: dict[str, SlideError] = field(default_factory=dict)

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Tiles of slides drawn at random, with replacement: uint8 (count, S, S, 3).

        Raises:
            InputError: no slide is left.
        """
        made: list[np.ndarray] = []
        while len(made) < count:
            if not self.slides:
                reasons = [f"{name}: {error}" for name, error in self.bad.items()]
                raise InputError("no slide of this kind is left to read", reasons)
            name = self.slides[int(rng.integers(len(self.slides)))]
            try:
                made.append(self._tile(name, rng))
            except SlideError as error:
                self.bad[name] = error
                self.slides.remove(name)
        return np.stack(made)

    def _tile(self, name: str, rng: np.random.Generator) -> np.ndarray:
        count = self.source.num_tiles(name)
        if not count:
            raise SlideError("no_tiles", "no tile of the slide was kept")
        return self.source(name, rng.integers(count, size=1), rng)[0]


@dataclass
class VPUResult:
    """What the training leaves.

    Attributes:
        state_dict: the encoder's model at the best epoch, on the CPU.
        best_epoch: lowest variational loss on validation tiles; 0 is the encoder as it came.
        history: `epoch`, `train_loss`, `val_loss` of each epoch.
        bad: slides that could not be read, with the reason.
    """

    state_dict: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)
    bad: dict[str, SlideError] = field(default_factory=dict)


class VPUTrainer:
    """An encoder, its head and how far they are.

    Args:
        config: the training.
        encoder: uint8 (B, S, S, 3), or float in 0..1, to (B, D); changed in place.
        source: gives the tiles.
        train, val: ids of the positive and of the unlabelled slides.
        state_path: where the state after each epoch is kept, and taken up from if it is there.
        device: to train on.

    Raises:
        InputError: a part has no slide of a kind.
    """

    def __init__(
        self,
        config: VPUConfig,
        encoder: Any,
        source: TileSource,
        train: tuple[Sequence[str], Sequence[str]],
        val: tuple[Sequence[str], Sequence[str]],
        *,
        state_path: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        parts = {"training": train, "validation": val}
        raise_problems(
            "VPU cannot be trained on these slides:",
            [
                f"no {kind} {part} slide"
                for part, kinds in parts.items()
                for kind, names in zip(KINDS, kinds, strict=True)
                if not names
            ],
        )
        self.config, self.state_path = config, state_path
        self.device = torch.device(device)
        self.encoder = encoder.to(self.device)
        with seeded(config.seed, self.device):
            self.head = nn.Linear(encoder.embed_dim, 2).to(self.device)
        self.optimiser = torch.optim.AdamW(
            [*self.encoder.parameters(), *self.head.parameters()],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.result = VPUResult()
        self._train = [TilePool(source, list(names), self.result.bad) for names in train]
        self._val = [TilePool(source, list(names), self.result.bad) for names in val]
        if state_path is not None and state_path.exists():
            self._take_up(state_path)

    def run(self, on_epoch: Callable[[dict[str, float]], None] = lambda record: None) -> VPUResult:
        """Train to the last epoch; the encoder is left in evaluation mode at the best one."""
        done = len(self.result.history)
        for epoch in range(done, self.config.epochs + 1):
            with seeded(self.config.seed + epoch, self.device):
                train_loss = self._epoch(epoch) if epoch else math.nan
                val_loss = self._validate()
            if epoch and not math.isfinite(train_loss):
                raise InputError(f"the loss is {train_loss} in epoch {epoch}; lower lr")
            record = {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss}
            if val_loss < min((r["val_loss"] for r in self.result.history), default=math.inf):
                self.result.best_epoch = epoch
                self.result.state_dict = cpu_copy(self.encoder.model.state_dict())
            self.result.history.append(record)
            self._keep()
            on_epoch(record)
        self.encoder.model.load_state_dict(self.result.state_dict)
        self.encoder.eval()
        return self.result

    def log_phi(self, images: Tensor) -> Tensor:
        """Log-probability of the positive class: (B,) float32."""
        with autocast(self.config.precision, self.device):
            features = self.encoder(images)
        return self.head(features.float()).log_softmax(dim=1)[:, 1]

    def _epoch(self, epoch: int) -> float:
        """Mean training loss."""
        config, total = self.config, 0.0
        self.encoder.train()
        for step in range(config.steps_per_epoch):
            rng = np.random.default_rng((config.seed, epoch, step))
            positive, unlabelled = (
                self._images(pool, config.batch_tiles, rng) for pool in self._train
            )
            logs = self.log_phi(torch.cat([positive, unlabelled]))
            log_positive, log_unlabelled = logs.split([len(positive), len(unlabelled)])
            mixed = mix(unlabelled, positive, log_unlabelled, alpha=config.mixup_alpha, rng=rng)
            loss = vpu_loss(
                log_unlabelled,
                log_positive,
                self.log_phi(mixed.inputs),
                mixed.targets,
                mixup_weight=config.mixup_weight,
            )
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            total += float(loss.detach())
        return total / config.steps_per_epoch

    def _images(self, pool: TilePool, count: int, rng: np.random.Generator) -> Tensor:
        """Float images in 0..1 on the device: (count, S, S, 3)."""
        tiles = torch.from_numpy(pool.draw(count, rng))
        tiles = turn_and_flip(tiles, rng) if self.config.augment else tiles
        return tiles.to(self.device).float() / 255.0

    @torch.no_grad()
    def _validate(self) -> float:
        """Variational loss on the same validation tiles each time."""
        self.encoder.eval()
        config, logs = self.config, []
        for kind, pool in enumerate(self._val):
            rng, parts = np.random.default_rng((config.seed, kind)), []
            for start in range(0, config.val_tiles, config.batch_tiles):
                count = min(config.batch_tiles, config.val_tiles - start)
                tiles = torch.from_numpy(pool.draw(count, rng)).to(self.device)
                parts.append(self.log_phi(tiles))
            logs.append(torch.cat(parts))
        positive, unlabelled = logs
        return float(variational_loss(unlabelled, positive))

    def _keep(self) -> None:
        if self.state_path is None:
            return
        state = {
            "model": self.encoder.model.state_dict(),
            "head": self.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "best": self.result.state_dict,
            "best_epoch": self.result.best_epoch,
            "history": self.result.history,
            "bad": {name: [e.code, e.message, e.region] for name, e in self.result.bad.items()},
        }
        with atomic_path(self.state_path) as temporary:
            torch.save(state, temporary)

    def _take_up(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location=self.device)
        self.encoder.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.result.state_dict = cpu_copy(state["best"])
        self.result.best_epoch, self.result.history = state["best_epoch"], state["history"]
        self.result.bad |= {name: SlideError(*parts) for name, parts in state["bad"].items()}
        for pool in (*self._train, *self._val):
            pool.slides = [name for name in pool.slides if name not in self.result.bad]
