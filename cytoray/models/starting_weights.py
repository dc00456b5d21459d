"""Weights that a backbone starts from: read from disk and fitted to its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import eva, vision_transformer
from torch import Tensor, nn

from cytoray.errors import InputError
from cytoray.models.encoder import SPEC_FILE, WEIGHTS_FILE, read_encoder
from cytoray.models.sr_transformer import SR_TABLES
from cytoray.models.weight_files import read_weights

_CLASSIFIERS = ("head.", "head_dist.", "fc.", "fc_norm.")


def read_start(source: str | Path) -> dict[str, Tensor]:
    """Weights of an encoder folder, of a checkpoint that holds one, or of a file.

    Args:
        source: such a folder (or one as the hub has it, with `model.safetensors`), a
            `.safetensors` file, or a PyTorch file without code in it.

    Raises:
        InputError: neither there, or damaged.
    """
    path = Path(source).expanduser()
    if (path / WEIGHTS_FILE).is_file() and not (path / SPEC_FILE).is_file():
        return read_weights(path / WEIGHTS_FILE)
    if path.is_dir():
        return read_encoder(path / "encoder" if (path / "encoder").is_dir() else path)[0]
    return read_weights(path)


def load_start(model: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Put weights into a timm model of the same architecture, in place.

    Published formats (DINOv2, DINOv3, OpenAI CLIP) get timm's keys; position tables and patch
    embeddings of another size are resampled; a classifier is left out. Relative position tables
    that the weights do not have stay as they are.

    Args:
        model: the timm model.
        weights: tensors by name.
        name: what to call the model in an error.

    Raises:
        InputError: weights of another architecture.
    """
    expected = model.state_dict()
    try:
        fitted = _filtered(model, dict(weights))
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"the weights to start from do not fit {name!r}: {error}") from error
    extra = [k for k in fitted if k not in expected and not k.startswith(_CLASSIFIERS)]
    absent = [k for k in expected if k not in fitted and not k.endswith(SR_TABLES)]
    wrong = [
        f"{k} is {tuple(fitted[k].shape)}, {name} has {tuple(v.shape)}"
        for k, v in expected.items()
        if k in fitted and fitted[k].shape != v.shape
    ]
    problems = [f"{k} is missing" for k in absent] + [f"{k} is not a weight of it" for k in extra]
    if problems or wrong:
        raise InputError(
            f"the weights to start from do not fit {name!r}", [*problems[:5], *wrong[:5]]
        )
    model.load_state_dict({k: fitted.get(k, v) for k, v in expected.items()})


def _filtered(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(model, eva.Eva):
        return eva.checkpoint_filter_fn(weights, model)
    if isinstance(model, vision_transformer.VisionTransformer):
        return vision_transformer.checkpoint_filter_fn(weights, model)
    return weights
