"""A MIL trial end to end: tiles through a LoRA-adapted encoder into an aggregator.

Pixels stay uint8 (k, S, S, 3) up to the encoder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from cytoray.errors import InputError, raise_problems
from cytoray.mil.adamw import AdamW
from cytoray.mil.base import Aggregator
from cytoray.mil.config import MILConfig
from cytoray.mil.packing import PackedBags, pack
from cytoray.mil.prefix import FrozenPrefix
from cytoray.mil.tiles import (
    TileSource,
    embed_tiles,
    features_above,
    spread_indices,
    turn_and_flip,
)
from cytoray.mil.train import LabelledBag, epoch_order, parameter_group, predict, train_frozen
from cytoray.mil.trial import (
    Batch,
    Classes,
    MILResult,
    OnEpoch,
    Trial,
    aggregator_of,
    check_labels,
    cpu_copy,
    seeded,
)
from cytoray.models.lora import add_lora, lora_state_dict, set_lora_training, trainable_parameters
from cytoray.precision import autocast


def backbone_of(encoder: nn.Module) -> nn.Module:
    """The timm model inside an encoder: its `backbone` or `model`.

    Raises:
        InputError: it has neither.
    """
    for name in ("backbone", "model"):
        module = getattr(encoder, name, None)
        if isinstance(module, nn.Module):
            return module
    raise InputError(
        f"{type(encoder).__name__} holds no timm model as `backbone` or `model`, so LoRA has "
        "nothing to adapt; make it with load_encoder"
    )


def adapt_encoder(encoder: nn.Module, config: MILConfig) -> nn.Module:
    """A frozen copy of `encoder` with the LoRA layers of `config`, in evaluation mode."""
    adapted = copy.deepcopy(encoder).eval()
    adapted.requires_grad_(False)
    backbone = backbone_of(adapted)
    add_lora(
        backbone,
        config.lora_rank,
        targets=config.lora_targets,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        last_blocks=config.lora_blocks,
    )
    if config.gradient_checkpointing:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    return adapted


def train_lora(
    config: MILConfig,
    encoder: nn.Module,
    tile_source: TileSource,
    train_ids: Sequence[str],
    train_labels: Sequence,
    val_ids: Sequence[str],
    val_labels: Sequence,
    num_classes: Classes,
    on_epoch: OnEpoch | None = None,
    *,
    frozen_features: Mapping[str, np.ndarray] | None = None,
    prefix: FrozenPrefix | None = None,
    device: torch.device | str = "cpu",
) -> MILResult:
    """Train an aggregator and the encoder's LoRA layers together; `encoder` is not changed.

    The aggregator first learns on frozen features (`warm_start_epochs`), so that the encoder is
    not led by a head that knows nothing; that state counts as epoch 0. Then each step draws
    `tiles_per_bag` tiles of each bag afresh, and the gradient goes through the encoder.

    Args:
        config: the trial.
        encoder: has a timm ViT as `.backbone` or `.model`, and maps uint8 (B, H, W, 3) to (B, D).
        tile_source: see `TileSource`.
        train_ids, train_labels: slides to train on and their labels in 0..C-1.
        val_ids, val_labels: slides to choose the epoch by.
        num_classes: C, or one C for each of several tasks.
        on_epoch: called with each epoch's record; a true answer stops the trial.
        frozen_features: features (N_i, D) of the slides by this encoder, for the warm start;
            None: the tiles are embedded for it.
        prefix: activations below the first adapted block, computed before; without `augment` the
            training tiles are taken from it as well.
        device: to train on.

    Raises:
        InputError: labels that do not fit, a slide without tiles, or a loss that is not finite.
    """
    device = torch.device(device)
    labels = check_labels(train_labels, val_labels, num_classes)
    _check_tiles(tile_source, [*train_ids, *val_ids])
    with seeded(config.seed, device):
        adapted = adapt_encoder(encoder, config).to(device)
        session = _LoraSession(config, adapted, tile_source, device, frozen_features, prefix)
        train_set, val_set = (list(train_ids), labels[0]), (list(val_ids), labels[1])
        return session.run(train_set, val_set, num_classes, on_epoch)


def _check_tiles(tile_source: TileSource, slide_ids: Sequence[str]) -> None:
    problems = [
        f"slide {slide_id} has no tile"
        for slide_id in slide_ids
        if tile_source.num_tiles(slide_id) < 1
    ]
    raise_problems("these slides cannot be used; leave them out:", problems)


class _LoraSession:
    """One LoRA trial under way: the adapted encoder, and how tiles become packed bags."""

    def __init__(
        self,
        config: MILConfig,
        encoder: nn.Module,
        tile_source: TileSource,
        device: torch.device,
        frozen_features: Mapping[str, np.ndarray] | None = None,
        prefix: FrozenPrefix | None = None,
    ) -> None:
        self.config, self.encoder, self.device = config, encoder, device
        self.prefix = prefix
        self.tile_source, self.frozen_features = tile_source, frozen_features
        self.backbone = backbone_of(encoder)

    def embed(self, slide_id: str, limit: int) -> Tensor:
        """Features of at most `limit` tiles of a slide, evenly spread, without gradient."""
        set_lora_training(self.backbone, False)
        indices = spread_indices(self.tile_source.num_tiles(slide_id), limit)
        return embed_tiles(
            self.encoder,
            self.tile_source,
            slide_id,
            indices,
            batch_tiles=self.config.batch_tiles,
            precision=self.config.precision,
            prefix=self.prefix,
        )

    def sample(self, slide_ids: Sequence[str], rng: np.random.Generator) -> PackedBags:
        """Fresh tiles of each slide through the encoder, with gradient."""
        picks = [(slide_id, self._pick(slide_id, rng)) for slide_id in slide_ids]
        held = self._held(picks)
        tiles = None if held is not None else self._pixels(picks, rng)
        set_lora_training(self.backbone, True)  # until the next embed: checkpoints recompute
        with autocast(self.config.precision, self.device):
            if self.prefix is not None and held is not None:
                features = features_above(self.encoder, self.prefix, held)
            else:
                features = self.encoder(tiles)
        if self.config.lora_rank and not features.requires_grad:
            raise InputError(
                "this encoder gives features without gradient, so LoRA cannot learn: its forward "
                "must not run under torch.no_grad"
            )
        counts = [len(indices) for _, indices in picks]
        return pack(features.float().split(counts)).to(self.device)

    def _pick(self, slide_id: str, rng: np.random.Generator) -> np.ndarray:
        num_tiles = self.tile_source.num_tiles(slide_id)
        size = min(self.config.tiles_per_bag, num_tiles)
        return np.sort(rng.choice(num_tiles, size, replace=False))

    def _held(self, picks: Sequence[tuple[str, np.ndarray]]) -> np.ndarray | None:
        """Activations of the picked tiles; None where some are not held, or are to be turned."""
        if self.prefix is None or self.config.augment:
            return None
        parts = []
        for slide_id, indices in picks:
            part = self.prefix(slide_id, indices)
            if part is None:
                return None
            parts.append(part)
        return np.concatenate(parts)

    def _pixels(self, picks: Sequence[tuple[str, np.ndarray]], rng: np.random.Generator) -> Tensor:
        """Pixels of the picked tiles, on the device, turned and flipped if asked for."""
        pixels = [torch.from_numpy(self.tile_source(*pick, rng)) for pick in picks]
        tiles = torch.cat(pixels).to(self.device)
        return turn_and_flip(tiles, rng) if self.config.augment else tiles

    def warm_start(self, train_set, val_set, num_classes: Classes) -> dict[str, Tensor]:
        """An aggregator's state after some epochs on frozen features."""
        config = replace(self.config, epochs=self.config.warm_start_epochs)
        train_bags, val_bags = (
            [
                LabelledBag(slide_id, self._frozen(slide_id), label)
                for slide_id, label in zip(slide_ids, labels.tolist(), strict=True)
            ]
            for slide_ids, labels in (train_set, val_set)
        )
        result = train_frozen(config, train_bags, val_bags, num_classes, device=self.device)
        return result.state_dict

    def _frozen(self, slide_id: str) -> np.ndarray | Tensor:
        """A slide's features by the encoder as it was (B is still zero)."""
        if self.frozen_features is not None:
            return self.frozen_features[slide_id]
        return self.embed(slide_id, self.config.eval_tiles)

    def run(self, train_set, val_set, num_classes: Classes, on_epoch: OnEpoch | None) -> MILResult:
        """Warm start, then train aggregator and LoRA together."""
        config = self.config
        (train_ids, train_labels), (val_ids, val_labels) = train_set, val_set
        in_dim = self.embed(train_ids[0], 1).shape[1]
        aggregator = aggregator_of(config, in_dim, num_classes).to(self.device)
        if config.warm_start_epochs:
            aggregator.load_state_dict(self.warm_start(train_set, val_set, num_classes))

        def batches(epoch: int) -> Iterator[Batch]:
            rng = np.random.default_rng((config.seed, epoch))
            for chosen in epoch_order(train_labels, config, rng):
                labels = torch.from_numpy(train_labels[chosen]).to(self.device)
                yield Batch(self.sample([train_ids[i] for i in chosen], rng), labels)

        def val_logits() -> tuple[np.ndarray, ...]:
            bags = (self.embed(slide_id, config.eval_tiles) for slide_id in val_ids)
            return predict(aggregator, bags).task_logits

        trial = Trial(
            config,
            aggregator,
            self._optimiser(aggregator),
            train_labels,
            val_labels,
            batches,
            val_logits,
            snapshot=lambda: {
                "state_dict": cpu_copy(aggregator.state_dict()),
                "lora_state": cpu_copy(lora_state_dict(self.backbone)),
            },
        )
        result = MILResult(config, in_dim, num_classes)
        return trial.run(result, on_epoch, start=config.warm_start_epochs > 0)

    def _optimiser(self, aggregator: Aggregator) -> AdamW:
        config = self.config
        groups = [parameter_group(aggregator, config)]
        lora = list(trainable_parameters(self.backbone).values())
        if lora:
            groups.append(
                {"params": lora, "lr": config.lora_lr, "weight_decay": config.lora_weight_decay}
            )
        return AdamW(groups)
