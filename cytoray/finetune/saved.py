"""An adapted classifier on disk: `adapter.safetensors` (what was trained) and `adapter.json`.

LoRA's A and B and the head are all that is kept of a LoRA trial; every weight of the encoder where
all were trained. The merged encoder is written by `export_encoder` as plain timm weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from cytoray.config import from_plain, to_plain
from cytoray.errors import InputError
from cytoray.finetune.adapters import Adapter, adapt, load_adapter_state, merged_weights
from cytoray.finetune.train import CellClassifier, TrainedCells
from cytoray.io import atomic_write_bytes, atomic_write_text
from cytoray.models.encoder import Encoder, load_encoder, save_encoder
from cytoray.plain import json_ready

WEIGHTS, FACTS = "adapter.safetensors", "adapter.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What one must know to use an adapter.

    Attributes:
        encoder: the form `load_encoder` took.
        encoder_id: hash of the weights it was trained on.
        adapter: what was trained.
        classes: names, in the order of the logits.
        fit: how images were made square, see `cytoray.finetune.pixels.FITS`.
        pretrained: for a name: published weights, else random ones.
        facts: metrics and whatever else is worth keeping.
    """

    encoder: str
    encoder_id: str
    adapter: Adapter
    classes: tuple[str, ...]
    fit: str = "squash"
    pretrained: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


def save_adapter(folder: str | Path, trained: TrainedCells, facts: AdapterFacts) -> Path:
    """Write what a trial has learnt; a reader sees the old adapter or the whole new one."""
    folder = Path(folder)
    tensors = {f"encoder.{k}": v.contiguous() for k, v in trained.adapter_state.items()}
    tensors |= {f"head.{k}": v.contiguous() for k, v in trained.head_state.items()}
    weights = safetensors.torch.save(tensors)
    plain = to_plain(replace(facts, facts=json_ready(facts.facts)))
    plain |= {"format": FORMAT, "sha256": hashlib.sha256(weights).hexdigest()}
    atomic_write_bytes(folder / WEIGHTS, weights)
    atomic_write_text(folder / FACTS, json.dumps(plain, indent=2) + "\n")
    return folder


def read_adapter(folder: str | Path) -> tuple[dict[str, torch.Tensor], AdapterFacts]:
    """Weights and facts of an adapter folder.

    Raises:
        InputError: no adapter there, or a damaged one.
    """
    folder = Path(folder)
    try:
        plain = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        weights = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise InputError(f"no adapter at {folder}: {error.strerror} ({error.filename})") from None
    except ValueError as error:
        raise InputError(f"{folder / FACTS} is not JSON: {error}") from None
    if plain.pop("format", None) != FORMAT:
        raise InputError(f"{folder / FACTS} is not an adapter of format {FORMAT}")
    if hashlib.sha256(weights).hexdigest() != plain.pop("sha256", ""):
        raise InputError(f"the weights at {folder} are not those of {FACTS}")
    kept = plain.pop("facts", {})
    return safetensors.torch.load(weights), replace(from_plain(AdapterFacts, plain), facts=kept)


def load_classifier(folder: str | Path, encoder: Encoder | None = None) -> CellClassifier:
    """An adapted encoder with its head, in evaluation mode, on the CPU.

    Args:
        folder: written by `save_adapter`.
        encoder: the encoder it belongs to; None: load the one it names.

    Raises:
        InputError: a damaged adapter, or another encoder than it was trained on.
    """
    weights, facts = read_adapter(folder)
    encoder = encoder or load_encoder(facts.encoder, pretrained=facts.pretrained)
    if encoder.encoder_id != facts.encoder_id:
        raise InputError(
            f"{folder} belongs to encoder {facts.encoder_id} ({facts.encoder}), not "
            f"{encoder.encoder_id}"
        )
    adapted = adapt(encoder, facts.adapter)
    state = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    load_adapter_state(adapted, facts.adapter, state)
    head_weight = weights["head.weight"]
    head = nn.Linear(head_weight.shape[1], head_weight.shape[0])
    head.load_state_dict({"weight": head_weight, "bias": weights["head.bias"]})
    return CellClassifier(adapted, head).eval()


def export_encoder(folder: str | Path, classifier: CellClassifier) -> Path:
    """Write the encoder of a classifier, LoRA merged in, as plain timm weights.

    Args:
        folder: of the encoder, see `save_encoder`.
        classifier: of `load_classifier`.
    """
    encoder = classifier.encoder
    assert encoder is not None, "a classifier of features has no encoder"
    source = {**encoder.spec.source, "adapted": True}
    return save_encoder(folder, merged_weights(encoder), replace(encoder.spec, source=source))
