"""Backbones, projection heads and encoders on disk."""

from typing import TYPE_CHECKING

from cytoray.lazy import lazy_names

if TYPE_CHECKING:
    from cytoray.models.backbones import BackboneFacts, Tokens, ViTBackbone, build_backbone
    from cytoray.models.encoder import (
        Encoder,
        EncoderSpec,
        load_encoder,
        read_encoder,
        save_encoder,
    )
    from cytoray.models.heads import DINOHead
    from cytoray.models.sr_transformer import SRConfig, use_sr

__all__ = [
    "BackboneFacts",
    "DINOHead",
    "Encoder",
    "EncoderSpec",
    "SRConfig",
    "Tokens",
    "ViTBackbone",
    "build_backbone",
    "load_encoder",
    "read_encoder",
    "save_encoder",
    "use_sr",
]

__getattr__ = lazy_names(
    __name__,
    {
        "backbones": ("BackboneFacts", "Tokens", "ViTBackbone", "build_backbone"),
        "encoder": ("Encoder", "EncoderSpec", "load_encoder", "read_encoder", "save_encoder"),
        "heads": ("DINOHead",),
        "sr_transformer": ("SRConfig", "use_sr"),
    },
)
