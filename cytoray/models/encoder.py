"""Encoders: safetensors with timm keys and a small JSON on disk; images in, features out.

A folder holds `model.safetensors` and `encoder.json`; plain timm loads it:

    spec = json.load(open("encoder.json"))
    model = timm.create_model(spec["architecture"], **{"num_classes": 0, **spec["kwargs"]})
    if spec["sr"]: cytoray.models.use_sr(model, **spec["sr"])
    model.load_state_dict(safetensors.torch.load_file("model.safetensors"))
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cytoray.errors import InputError, raise_problems
from cytoray.models.linear import use_cpu_products
from cytoray.models.sr_transformer import SRConfig, use_sr

WEIGHTS_FILE = "model.safetensors"
SPEC_FILE = "encoder.json"
SPEC_FORMAT = 1
ID_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What one must know to use the weights.

    Attributes:
        architecture: timm name.
        img_px: side of the images it was made for; others are resized to it.
        mpp: resolution of the images it was trained on, um/px; None if not known.
        mean: per channel, of pixels in 0..1.
        std: per channel.
        patch_px: side of a patch (0: not a ViT).
        embed_dim: width D of the features.
        pooling: one of `POOLINGS`.
        kwargs: arguments of `timm.create_model` beyond the name.
        sr: SR-attention that the model has; None: plain.
        source: where the weights come from, for people.
    """

    architecture: str
    img_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch_px: int
    embed_dim: int
    mpp: float | None = None
    pooling: str = "cls"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    sr: SRConfig | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if self.pooling not in POOLINGS:
            problems.append(f"pooling {self.pooling!r} is none of {', '.join(sorted(POOLINGS))}")
        if self.img_px < 1 or self.embed_dim < 1:
            problems.append("img_px and embed_dim must be at least 1")
        if self.mpp is not None and self.mpp <= 0:
            problems.append(f"mpp must be above 0, is {self.mpp}")
        if len(self.mean) != 3 or len(self.std) != 3:
            problems.append("mean and std must have 3 values")
        raise_problems("the encoder's description cannot be used", problems)


def _pool_model(model: Any, images: Tensor) -> Tensor:
    return model(images)


def _pool_cls(model: Any, images: Tensor) -> Tensor:
    return model.forward_features(images)[:, 0]


def _pool_mean(model: Any, images: Tensor) -> Tensor:
    return model.forward_features(images)[:, model.num_prefix_tokens :].mean(1)


def _pool_cls_mean(model: Any, images: Tensor) -> Tensor:
    tokens = model.forward_features(images)
    return torch.cat([tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(1)], dim=-1)


POOLINGS = {
    "cls": _pool_cls,
    "mean": _pool_mean,
    "cls+mean": _pool_cls_mean,
    "model": _pool_model,  # the architecture's own, e.g. the average of a ResNet's map
}


class Encoder(nn.Module):
    """Images to features: resize, normalise and encode on the device of the weights.

    Args:
        model: timm model without classifier.
        spec: its description.

    Attributes:
        embed_dim: width D of what `forward` returns.
    """

    mean: Tensor
    std: Tensor

    @cached_property
    def encoder_id(self) -> str:
        """First 16 hex digits of the SHA-256 of the weights, the same on every machine."""
        return weights_id(self.model.state_dict())

    def __init__(self, model: nn.Module, spec: EncoderSpec) -> None:
        super().__init__()
        use_cpu_products(model)
        self.model = model
        self.spec = spec
        self.embed_dim = spec.embed_dim * (2 if spec.pooling == "cls+mean" else 1)
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features float (B, D) of RGB images.

        Args:
            images: (B, H, W, 3) or (B, 3, H, W); uint8, or float in 0..1.

        Raises:
            InputError: another shape or type.
        """
        return POOLINGS[self.spec.pooling](self.model, self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """Images as in `forward` to normalised float32 (B, 3, img_px, img_px)."""
        x = channels_first(images).to(self.mean.device)
        x = x.float() / 255.0 if x.dtype == torch.uint8 else x.to(self.mean.dtype)
        size = (self.spec.img_px, self.spec.img_px)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
            x = x.clamp(0.0, 1.0)
        return ((x - self.mean) / self.std).contiguous()


def channels_first(images: Tensor) -> Tensor:
    """(B, H, W, 3) or (B, 3, H, W) as (B, 3, H, W), without a copy."""
    if images.dim() == 4 and (images.dtype == torch.uint8 or images.is_floating_point()):
        if images.shape[-1] == 3:
            return images.permute(0, 3, 1, 2)
        if images.shape[1] == 3:
            return images
    raise InputError(
        f"images must be uint8 or float of shape (B, H, W, 3) or (B, 3, H, W), not {images.dtype} "
        f"{tuple(images.shape)}"
    )


def weights_id(weights: Mapping[str, Tensor]) -> str:
    """Short SHA-256 over names, types, shapes and bytes of the tensors, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:ID_LENGTH]


def write_encoder(folder: Path, weights: Mapping[str, Tensor], spec: EncoderSpec) -> None:
    """Write the two files into an existing folder (see `save_encoder` for the atomic form)."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    plain = dataclasses.asdict(spec) | {
        "format": SPEC_FORMAT,
        "encoder_id": weights_id(tensors),
        "kwargs": dict(spec.kwargs),
        "source": dict(spec.source),
    }
    (folder / SPEC_FILE).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def save_encoder(folder: str | Path, weights: Mapping[str, Tensor], spec: EncoderSpec) -> Path:
    """Write an encoder folder so that it is there whole or not at all; replaces an old one.

    Args:
        folder: where to.
        weights: state dict with timm's keys.
        spec: description of the weights.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    draft.mkdir()
    try:
        write_encoder(draft, weights, spec)
        replace_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def replace_folder(draft: Path, folder: Path) -> None:
    """Rename `draft` to `folder` after its files reached the disk; an old one is removed last."""
    for path in [*sorted(draft.rglob("*")), draft]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    old = None
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old")
        os.rename(folder, old)
    os.rename(draft, folder)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def read_encoder(folder: str | Path) -> tuple[dict[str, Tensor], EncoderSpec]:
    """Read weights (CPU) and description of an encoder folder.

    Raises:
        InputError: not an encoder folder, or damaged.
    """
    folder = Path(folder)
    missing = [name for name in (WEIGHTS_FILE, SPEC_FILE) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} is not an encoder folder: {' and '.join(missing)} not there")
    try:
        plain = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
        names = {f.name for f in dataclasses.fields(EncoderSpec)}
        fields: dict[str, Any] = {k: v for k, v in plain.items() if k in names}
        fields |= {"mean": tuple(plain["mean"]), "std": tuple(plain["std"])}
        fields["sr"] = SRConfig(**plain["sr"]) if plain.get("sr") else None
        spec = EncoderSpec(**fields)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"encoder folder {folder} is damaged: {error}") from error
    if plain.get("encoder_id") != weights_id(weights):
        raise InputError(f"encoder folder {folder} is damaged: weights and {SPEC_FILE} differ")
    return weights, spec


def load_encoder(
    source: str | Path,
    *,
    pretrained: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
    kwargs: Mapping[str, Any] | None = None,
) -> Encoder:
    """An encoder in eval mode, from a folder or by name.

    Args:
        source: folder written by `save_encoder` (or a checkpoint that holds one as `encoder/`),
            or any name of `cytoray.models.sources`: timm, open_clip, a known short name, a file.
        pretrained: for a timm name, load the published weights; else random ones by `seed`.
        seed: of random weights.
        device: where to put it.
        kwargs: for a timm name, further arguments of `timm.create_model`.

    Raises:
        InputError: no such folder or name (near names are listed), or damaged files.
    """
    folder = Path(source)
    if (folder / "encoder" / SPEC_FILE).is_file():
        folder = folder / "encoder"
    timm_folder = (folder / "config.json").is_file() and not (folder / SPEC_FILE).is_file()
    if folder.is_dir() and not timm_folder:
        encoder = _from_folder(folder)
    else:
        from cytoray.models.sources import load_named

        name = f"local-dir:{folder}" if timm_folder else str(source)
        encoder = load_named(name, pretrained=pretrained, seed=seed, kwargs=kwargs or {})
    return encoder.to(device).eval()


def _from_folder(folder: Path) -> Encoder:
    weights, spec = read_encoder(folder)
    try:
        with torch.device("meta"):  # no time spent on drawing weights that are replaced
            model = _built(spec)
        if set(dict(model.named_buffers())) - set(weights):  # tables computed when it is built
            model = _built(spec)
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"encoder folder {folder} does not fit timm's model: {error}") from error
    return Encoder(model, spec)


def _built(spec: EncoderSpec) -> nn.Module:
    options = {"num_classes": 0, **spec.kwargs}
    model = cast(nn.Module, timm.create_model(spec.architecture, **options))
    return model if spec.sr is None else use_sr(model, **dataclasses.asdict(spec.sr))
