"""Which timm architectures can be pretrained, and what timm is told to build them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import timm
from timm.models import get_pretrained_cfg, is_model_in_modules, load_model_config_from_hf
from timm.models.eva import Eva, EvaBlock
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cytoray.errors import InputError
from cytoray.models.weight_files import first_line, hub_connection

HUB = ("hf-hub:", "hf_hub:")
SERVED = ("vit_*", "deit*", "eva*", "resnet*", "resnext*", "wide_resnet*", "seresnet*")
_CONVOLUTIONAL = ["resnet"]


def close_names(name: str, valid: Sequence[str]) -> str:
    """`did you mean a, b?` for the names nearest to `name`, else an empty string."""
    near = difflib.get_close_matches(name, valid, n=5, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


def timm_options(name: str, img_px: int) -> dict[str, Any]:
    """Arguments of `timm.create_model` with which plain timm builds the encoder that is exported.

    Args:
        name: timm architecture.
        img_px: side of the crops its position table is made for.
    """
    if is_model_in_modules(name.split(".")[0], _CONVOLUTIONAL):
        return {}
    return {"img_size": img_px, "global_pool": "token"}


@lru_cache(maxsize=64)
def resolve_name(name: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """timm architecture that a name stands for, and the arguments that belong to it.

    Args:
        name: a timm name, or `hf-hub:OWNER/MODEL` (its configuration is read from the hub or its
            cache).

    Raises:
        InputError: no such architecture, or a hub that cannot be asked.
    """
    if name.startswith(HUB):
        try:
            with hub_connection():
                _, architecture, options = load_model_config_from_hf(name.split(":", 1)[1])
        except Exception as error:  # the hub's client raises many kinds
            raise InputError(
                f"backbone {name!r}: its description cannot be had from the hub "
                f"({first_line(error)}); name its timm architecture and give the weights as "
                "backbone.init_from FILE"
            ) from error
        return architecture, tuple(sorted((options or {}).items()))
    if not timm.is_model(name.split(".")[0]):
        known = [found for pattern in SERVED for found in timm.list_models(pattern)]
        raise InputError(f"unknown backbone {name!r}{close_names(name.split('.')[0], known)}")
    return name, ()


def create_model(
    name: str, *, img_px: int | None = None, pretrained: bool = False, kwargs: Mapping[str, Any]
) -> Any:
    """A timm model that a backbone can be made of, without classifier.

    Args:
        name: as in `resolve_name`.
        img_px: side of the crops its position table is made for; None: timm's own.
        pretrained: load timm's published weights; position tables are resampled.
        kwargs: further arguments of `timm.create_model`.

    Raises:
        InputError: unknown name or arguments, weights that cannot be had, or an architecture that
            cannot be pretrained here (it says why).
    """
    architecture, own = resolve_name(name)
    options: dict[str, Any] = {"num_classes": 0}
    if not is_model_in_modules(architecture.split(".")[0], _CONVOLUTIONAL):
        options["dynamic_img_size"] = True
        options |= timm_options(architecture, img_px or 0)
        if img_px is None:
            del options["img_size"]
    options = dict(own) | options | dict(kwargs)
    source = name if pretrained else architecture
    try:
        with hub_connection():
            model = timm.create_model(source, pretrained=pretrained, **options)
    except (TypeError, ValueError, AssertionError, OSError, RuntimeError) as error:
        given = dict(kwargs) | ({} if img_px is None else {"img_size": img_px})
        reason = unserved(_plain(architecture)) or first_line(error)
        raise InputError(f"timm cannot build backbone {name!r} with {given}: {reason}") from error
    reason = unserved(model)
    if reason is not None:
        raise InputError(f"backbone {name!r} ({type(model).__name__}) {reason}")
    return model


def unserved(model: nn.Module | None) -> str | None:
    """Why a timm model cannot be pretrained here; None if it can."""
    if model is None or isinstance(model, ResNet):
        return None
    advice = (
        "take a timm ViT (`vit_*`), a DINOv3 or EVA ViT (`vit_*_dinov3`, `eva02_*`) or a ResNet "
        "(`resnet50`)"
    )
    if not isinstance(model, VisionTransformer | Eva):
        return f"is none of the families that can be pretrained; {advice}"
    if model.cls_token is None:
        return f"has no class token, which the methods compare; {advice}"
    blocks = cast(Any, model.blocks)
    if isinstance(model, Eva) and not all(isinstance(block, EvaBlock) for block in blocks):
        return f"norms its branches behind them, and drop path here needs them in front; {advice}"
    return None


def _plain(architecture: str) -> nn.Module | None:
    """The architecture as timm builds it when told nothing; None if even that fails."""
    import torch

    try:
        with torch.device("meta"):
            return timm.create_model(architecture.split(".")[0], num_classes=0)
    except Exception:  # whatever timm says: the first error is the one to show
        return None


def published_normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std that the published weights of a name expect; None if it has none."""
    if name.startswith(HUB):
        resolve_name(name)  # says what is wrong when the hub cannot be asked
        with hub_connection():
            config = load_model_config_from_hf(name.split(":", 1)[1])[0]
        return tuple(config["mean"]), tuple(config["std"])
    published = get_pretrained_cfg(name)
    return None if published is None else (published.mean, published.std)
