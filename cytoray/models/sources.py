"""Encoders by name: known names, any timm name, open_clip, random weights, local files.

| form | what |
|---|---|
| `clip`, `uni`, ... | one of `KNOWN` |
| `vit_small_patch16_224.augreg_in21k`, `hf-hub:OWNER/MODEL` | timm |
| `open_clip:ViT-B-16/openai`, `open_clip:hf-hub:OWNER/MODEL` | open_clip's visual tower |
| `local-dir:FOLDER` | a folder with timm's `config.json` and weights |
| `NAME@FILE` | a timm architecture with weights from a local file |
| `random:FORM` | the same with random weights |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import load_model_config_from_hf
from timm.models._hub import load_model_config_from_path
from torch import nn

from cytoray.errors import InputError
from cytoray.models.architectures import HUB, close_names
from cytoray.models.encoder import SPEC_FILE, Encoder, EncoderSpec
from cytoray.models.weight_files import first_line, hub_connection, read_weights

RANDOM, OPEN_CLIP, LOCAL_DIR = "random:", "open_clip:", "local-dir:"


@dataclass(frozen=True, kw_only=True)
class Known:
    """An encoder people know by a short name.

    Attributes:
        source: any other form.
        about: what it is.
        kwargs: for timm.
        gated: whether its terms must be accepted before its weights can be had.
    """

    source: str
    about: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = False


KNOWN = {
    "clip": Known(
        source="vit_base_patch16_clip_quickgelu_224.openai",
        about="CLIP ViT-B/16 (Radford et al. 2021), image embedding",
        kwargs={"num_classes": 512},
    ),
    "clip-l14": Known(
        source="vit_large_patch14_clip_quickgelu_224.openai",
        about="CLIP ViT-L/14, image embedding",
        kwargs={"num_classes": 768},
    ),
    "quilt": Known(
        source="open_clip:hf-hub:wisdomik/QuiltNet-B-16",
        about="QuiltNet ViT-B/16 (Ikezogwo et al. 2023)",
    ),
    "quilt-b32": Known(
        source="open_clip:hf-hub:wisdomik/QuiltNet-B-32",
        about="QuiltNet ViT-B/32, the size in the released code of Dausort et al.",
    ),
    "biomedclip": Known(
        source="open_clip:hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        about="BiomedCLIP ViT-B/16 (Zhang et al. 2023)",
    ),
    "vit": Known(
        source="vit_base_patch16_224.orig_in21k_ft_in1k",
        about="ViT-B/16 of ImageNet (Dosovitskiy et al. 2020)",
    ),
    "uni": Known(
        source="hf-hub:MahmoodLab/UNI",
        about="UNI ViT-L/16 (Chen et al. 2024)",
        kwargs={"init_values": 1e-5, "dynamic_img_size": True},
        gated=True,
    ),
    "gigapath": Known(
        source="hf-hub:prov-gigapath/prov-gigapath",
        about="Prov-GigaPath ViT-g/14 (Xu et al. 2024)",
        gated=True,
    ),
}


def load_named(name: str, *, pretrained: bool, seed: int, kwargs: Mapping[str, Any]) -> Encoder:
    """An encoder by any of the forms above, on the CPU.

    Args:
        name: see the table at the top.
        pretrained: published weights, else random ones by `seed`.
        seed: of random weights.
        kwargs: further arguments of `timm.create_model`.

    Raises:
        InputError: no such name, weights that cannot be had (it says how), or a damaged file.
    """
    if name.startswith(RANDOM):
        pretrained, name = False, name.removeprefix(RANDOM)
    known = KNOWN.get(name)
    source, options = (known.source, {**known.kwargs, **kwargs}) if known else (name, dict(kwargs))
    with torch.random.fork_rng(devices=[]), hub_connection():
        torch.manual_seed(seed)
        if source.startswith(OPEN_CLIP):
            from cytoray.models.open_clip_towers import load_open_clip

            return load_open_clip(source.removeprefix(OPEN_CLIP), pretrained=pretrained)
        if "@" in source and not source.startswith((*HUB, LOCAL_DIR)):
            architecture, _, path = source.partition("@")
            return _from_file(architecture, path, options)
        return _from_timm(source, pretrained, options, seed)


def _from_timm(name: str, pretrained: bool, kwargs: Mapping[str, Any], seed: int) -> Encoder:
    """A timm model; one from a hub or folder is described by its architecture's own name."""
    architecture, options = name, dict(kwargs)
    try:
        if name.startswith(HUB):
            _, architecture, saved = load_model_config_from_hf(name.split(":", 1)[1])
            options = {**(saved or {}), **options}
        elif name.startswith(LOCAL_DIR):
            _, architecture, saved = load_model_config_from_path(name.removeprefix(LOCAL_DIR))
            options = {**(saved or {}), **options}
        else:
            _check_timm_name(name)
        model = timm.create_model(name, pretrained=pretrained, **{"num_classes": 0, **options})
    except InputError:
        raise
    except Exception as error:  # the hub's client and timm raise many kinds
        raise weights_error(name, error) from error
    source = {"timm": name, "pretrained": pretrained, "seed": None if pretrained else seed}
    return Encoder(model, spec_of_timm(model, architecture, options, source))


def _check_timm_name(name: str) -> None:
    plain_name = name.split("/")[-1].split(".")[0]
    if "/" in name or not timm.is_model(plain_name):
        near = close_names(plain_name, [*KNOWN, *timm.list_models()])
        if "/" in name and Path(name).exists():
            near = ""
        elif "/" in name:
            near = f" (nothing is at {Path(name).expanduser()})"
        raise InputError(
            f"encoder {name!r} is neither a folder with {SPEC_FILE} nor a timm model{near}; other "
            f"forms: {', '.join(KNOWN)}, hf-hub:OWNER/MODEL, open_clip:MODEL/WEIGHTS, NAME@FILE, "
            "local-dir:FOLDER, random:NAME"
        )


def spec_of_timm(
    model: Any, architecture: str, kwargs: Mapping[str, Any], source: Mapping[str, Any]
) -> EncoderSpec:
    """Describe a timm model by what it says of itself.

    Args:
        model: the timm model.
        architecture: its timm name.
        kwargs: arguments it was made with beyond the name; `num_classes` is the width of a
            projection that is part of the encoder.
        source: where the weights come from.
    """
    data = resolve_model_data_config(model)
    patch_embed = getattr(model, "patch_embed", None)
    patch_size = getattr(patch_embed, "patch_size", None) or (0,)
    img_size = getattr(patch_embed, "img_size", None) or data["input_size"][-2:]
    return EncoderSpec(
        architecture=architecture,
        img_px=int(img_size[-1]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        patch_px=int(patch_size[0]),
        embed_dim=int(kwargs.get("num_classes") or model.num_features),
        pooling="model",
        kwargs=dict(kwargs),
        source=dict(source),
    )


def _from_file(architecture: str, path: str, kwargs: Mapping[str, Any]) -> Encoder:
    """A timm architecture with the weights of a local file.

    Raises:
        InputError: no such file or architecture, or weights that do not fit.
    """
    _check_timm_name(architecture)
    weights = read_weights(Path(path).expanduser())
    model = cast(nn.Module, timm.create_model(architecture, **{"num_classes": 0, **kwargs}))
    expected = model.state_dict()
    extra = [key for key in weights if key not in expected and not key.startswith("head.")]
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is not a weight of {architecture}" for key in extra]
    problems += [
        f"{key} is {tuple(weights[key].shape)}, {architecture} has {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if problems:
        raise InputError(f"the weights in {path} do not fit {architecture}", problems[:10])
    model.load_state_dict({key: weights[key] for key in expected})
    return Encoder(model, spec_of_timm(model, architecture, kwargs, {"file": path}))


def weights_error(name: str, error: Exception) -> InputError:
    """What to tell a user whose encoder could not be had: gated, offline, or refused by timm."""
    known = next((k for k in KNOWN.values() if name in (k.source, _hub_id(k.source))), None)
    hub = _hub_id(name)
    causes = [error, *_causes(error)]
    kinds = {type(cause).__name__ for cause in causes}
    hints = []
    if hub and ((known and known.gated) or "GatedRepoError" in kinds):
        hints.append(
            f"its weights are gated: accept the terms at https://huggingface.co/{hub} with your "
            "account, make a read token at https://huggingface.co/settings/tokens, and set it: "
            "export HF_TOKEN=hf_..."
        )
    if hub or kinds & _NO_CONNECTION or any(isinstance(c, ConnectionError) for c in causes):
        fetch = f"`hf download {hub}`" if hub else "the same command"
        hints.append(
            f"without a connection to the hub: run {fetch} where there is one and copy its cache "
            "(the folder HF_HOME names) here, or give a local copy: local-dir:FOLDER, NAME@FILE"
        )
        tried = "vit_base_patch16_224" if hub else name
        hints.append(f"to try the pipeline with random weights: {RANDOM}{tried}")
    return InputError(f"encoder {name!r} cannot be loaded: {first_line(error)}", hints)


_NO_CONNECTION = frozenset({"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError"})


def _hub_id(name: str) -> str:
    """OWNER/MODEL of a hub name, else an empty string."""
    name = name.removeprefix(OPEN_CLIP)
    return name.split(":", 1)[1] if name.startswith(HUB) else ""


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found
