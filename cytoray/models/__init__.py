"""Backbones, projection heads and encoders on disk."""

from cytoray.models.backbones import BackboneFacts, Tokens, ViTBackbone, build_backbone
from cytoray.models.encoder import Encoder, EncoderSpec, load_encoder, read_encoder, save_encoder
from cytoray.models.heads import DINOHead

__all__ = [
    "BackboneFacts",
    "DINOHead",
    "Encoder",
    "EncoderSpec",
    "Tokens",
    "ViTBackbone",
    "build_backbone",
    "load_encoder",
    "read_encoder",
    "save_encoder",
]
