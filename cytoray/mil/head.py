"""A trained head on disk: `head.safetensors` (weights) and `head.json` (what they are)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from cytoray.config import from_plain, to_plain
from cytoray.errors import InputError
from cytoray.io import atomic_write_bytes, atomic_write_text
from cytoray.mil.base import Aggregator, task_classes_of
from cytoray.mil.config import MILConfig
from cytoray.mil.train_lora import adapt_encoder, backbone_of
from cytoray.mil.trial import MILResult, aggregator_of
from cytoray.models.lora import load_lora_state

WEIGHTS, FACTS = "head.safetensors", "head.json"
FORMAT = 2


@dataclass
class MILHead:
    """An aggregator ready to predict, and the encoder it belongs to.

    Attributes:
        aggregator: in evaluation mode, on the CPU.
        config: the trial it comes from.
        in_dim: width D of the features.
        classes: class names, in the order of the logits; of the first task, if several.
        encoder_id: the encoder whose features the head was trained on.
        encoder_name: for people.
        lora_state: LoRA weights of the encoder; empty if it was left as it is.
        val_metrics: on the validation bags it was chosen by.
        extra: what the caller wished to keep, e.g. task, tile_px, mpp.
        tasks: class names of each task, by the task's name; a single task is called `label`.
    """

    aggregator: Aggregator
    config: MILConfig
    in_dim: int
    classes: tuple[str, ...]
    encoder_id: str
    encoder_name: str = ""
    lora_state: dict[str, Tensor] = field(default_factory=dict)
    val_metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def adapt(self, encoder: nn.Module) -> nn.Module:
        """The encoder this head needs: a copy with its LoRA weights, or `encoder` itself.

        Raises:
            InputError: the LoRA weights do not fit this encoder.
        """
        if not self.lora_state:
            return encoder
        adapted = adapt_encoder(encoder, self.config)
        load_lora_state(backbone_of(adapted), self.lora_state)
        return adapted


def save_head(
    folder: str | Path,
    result: MILResult,
    *,
    classes: tuple[str, ...] | Mapping[str, Sequence[str]],
    encoder_id: str,
    encoder_name: str = "",
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a trial's best head to `folder`; a reader sees the old head or the whole new one.

    Args:
        folder: made if missing.
        result: of `train_frozen` or `train_lora`.
        classes: class names, in the order of the labels; of several tasks, by the task's name.
        encoder_id: the encoder's id (its hash).
        encoder_name: for people.
        extra: JSON values to keep with the head.

    Raises:
        InputError: as many class names as classes are needed.
    """
    folder = Path(folder)
    tasks = dict(classes) if isinstance(classes, Mapping) else {"label": classes}
    counts = tuple(len(names) for names in tasks.values())
    if counts != task_classes_of(result.num_classes):
        shown = ", ".join(map(str, counts))
        raise InputError(f"{shown} class names for {result.num_classes} classes")
    parts = {"aggregator": result.state_dict, "lora": result.lora_state}
    tensors = {
        f"{part}.{name}": value.contiguous()
        for part, state in parts.items()
        for name, value in state.items()
    }
    weights = safetensors.torch.save(tensors)
    facts = {
        "format": FORMAT,
        "config": to_plain(result.config),
        "in_dim": result.in_dim,
        "tasks": {task: list(names) for task, names in tasks.items()},
        "encoder_id": encoder_id,
        "encoder_name": encoder_name,
        "best_epoch": result.best_epoch,
        "val_metrics": {k: v if v == v else None for k, v in result.val_metrics.items()},
        "extra": extra or {},
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    atomic_write_bytes(folder / WEIGHTS, weights)
    atomic_write_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")
    return folder


def load_head(folder: str | Path) -> MILHead:
    """Read what `save_head` wrote.

    Raises:
        InputError: no head there, one only half written, or one of another format.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        weights = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise InputError(f"no head at {folder}: {error.strerror} ({error.filename})") from None
    except ValueError as error:
        raise InputError(f"{folder / FACTS} is not JSON: {error}") from None
    if facts.get("format") != FORMAT:
        raise InputError(
            f"{folder / FACTS} is not a head of format {FORMAT}; save it again with `tune`"
        )
    if hashlib.sha256(weights).hexdigest() != facts["sha256"]:
        raise InputError(f"the weights at {folder} are not those of {FACTS}; save the head again")
    states: dict[str, dict[str, Tensor]] = {"aggregator": {}, "lora": {}}
    for name, value in safetensors.torch.load(weights).items():
        part, key = name.split(".", 1)
        states[part][key] = value
    config = from_plain(MILConfig, facts["config"])
    tasks = {task: tuple(names) for task, names in facts["tasks"].items()}
    counts = tuple(len(names) for names in tasks.values())
    num_classes = counts[0] if len(counts) == 1 else counts  # as it was trained
    aggregator = aggregator_of(config, facts["in_dim"], num_classes)
    aggregator.load_state_dict(states["aggregator"])
    return MILHead(
        aggregator.eval(),
        config,
        facts["in_dim"],
        next(iter(tasks.values())),
        facts["encoder_id"],
        facts["encoder_name"],
        states["lora"],
        {k: float("nan") if v is None else v for k, v in facts["val_metrics"].items()},
        facts["extra"],
        tasks,
    )
