"""open_clip's visual towers as timm models: one form for LoRA, export and attention maps.

open_clip is an optional dependency (`pip install cytoray[clip]`) and imported when asked for. A
tower becomes the timm ViT with the same weights, its projection to the shared embedding as timm's
`head`; the two are compared on an image before the model is used.
"""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from cytoray.errors import InputError
from cytoray.models.architectures import close_names
from cytoray.models.encoder import Encoder, EncoderSpec
from cytoray.models.sources import HUB, OPEN_CLIP, weights_error

TOLERANCE = 1e-3


def load_open_clip(name: str, *, pretrained: bool) -> Encoder:
    """The visual tower of an open_clip model.

    Args:
        name: `MODEL/WEIGHTS`, e.g. `ViT-B-16/openai`; `MODEL` for its random weights alone; or
            `hf-hub:OWNER/MODEL`.
        pretrained: published weights, else random ones.

    Raises:
        InputError: open_clip is not installed, an unknown model or weights, weights that cannot be
            had, or a tower that is not a ViT.
    """
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"encoder {OPEN_CLIP}{name} needs open_clip, which is not installed: "
            "pip install 'cytoray[clip]'"
        ) from None
    model_name, tag = (name, None) if name.startswith(HUB) else _split(open_clip, name, pretrained)
    try:
        if name.startswith(HUB) and not pretrained:
            # The hub's config is needed for the architecture; only the weights are left out.
            clip = open_clip.create_model(model_name, load_weights=False)
        else:
            clip = open_clip.create_model(model_name, pretrained=tag)
    except Exception as error:  # open_clip, its tokenizers and the hub raise many kinds
        raise weights_error(f"{OPEN_CLIP}{name}", error) from error
    clip = cast(Any, clip).eval()
    size = clip.visual.image_size
    img_px = int(size[-1] if isinstance(size, (tuple, list)) else size)
    architecture, kwargs, weights = tower_as_timm(clip.visual, img_px)
    model = cast(nn.Module, timm.create_model(architecture, **kwargs)).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, cast(Any, model)))
    _compare(clip.visual, model, img_px, name)
    preprocess = open_clip.get_model_preprocess_cfg(clip)
    spec = EncoderSpec(
        architecture=architecture,
        img_px=img_px,
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        patch_px=int(cast(Any, model).patch_embed.patch_size[0]),
        embed_dim=int(kwargs["num_classes"] or cast(Any, model).num_features),
        pooling="model",
        kwargs=kwargs,
        source={"open_clip": name, "pretrained": pretrained},
    )
    return Encoder(model, spec)


def _split(open_clip: Any, name: str, pretrained: bool) -> tuple[str, str | None]:
    """Model and weights of `MODEL/WEIGHTS`, both known to open_clip."""
    model_name, _, tag = name.partition("/")
    models = open_clip.list_models()
    if model_name not in models:
        raise InputError(f"unknown open_clip model {model_name!r}{close_names(model_name, models)}")
    if not pretrained:
        return model_name, None
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if tag not in tags:
        raise InputError(
            f"open_clip has no weights {tag!r} for {model_name}; valid: "
            f"{', '.join(f'{model_name}/{t}' for t in tags) or 'none'} (or random:open_clip:...)"
        )
    return model_name, tag


def tower_as_timm(visual: Any, img_px: int) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The timm architecture, its arguments, and the weights under open_clip's names.

    Args:
        visual: open_clip's `VisionTransformer`, or its `TimmModel` around a timm ViT.
        img_px: side of its images.

    Raises:
        InputError: another kind of tower.
    """
    weights = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and hasattr(trunk, "blocks"):
        layers = {name: layer for name, layer in visual.head.named_children() if name != "drop"}
        head = layers.pop("proj", None)
        if layers or not isinstance(head, nn.Linear | None):
            raise _not_a_vit(visual, "its projection is not one Linear")
        architecture = str(trunk.pretrained_cfg["architecture"])
        width = 0 if head is None else head.out_features
        return architecture, {"img_size": img_px, "num_classes": width}, weights
    if not hasattr(visual, "conv1") or not hasattr(visual, "transformer"):
        raise _not_a_vit(visual, "it is not a ViT")
    block = visual.transformer.resblocks[0]
    width = visual.conv1.out_channels
    quick = type(block.mlp.gelu).__name__ == "QuickGELU"
    kwargs = {
        "img_size": img_px,
        "patch_size": int(visual.conv1.kernel_size[0]),
        "embed_dim": width,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / width,
        "num_classes": 0 if visual.proj is None else visual.proj.shape[1],
    }
    name = "vit_base_patch16_clip_quickgelu_224" if quick else "vit_base_patch16_clip_224"
    return name, kwargs, weights


def _not_a_vit(visual: Any, why: str) -> InputError:
    return InputError(
        f"this open_clip model's visual tower ({type(visual).__name__}) cannot be used: {why}; "
        "take one with a plain ViT, e.g. ViT-B-16"
    )


@torch.no_grad()
def _compare(visual: Any, model: nn.Module, img_px: int, name: str) -> None:
    """Both forms must give the same embedding of an image."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, img_px, img_px, generator=generator)
    theirs, ours = visual(image), model(image)
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=TOLERANCE, rtol=1e-3):
        raise InputError(
            f"open_clip model {name!r} has parts in its visual tower that a timm ViT does not; "
            "take one with a plain ViT, e.g. ViT-B-16"
        )
