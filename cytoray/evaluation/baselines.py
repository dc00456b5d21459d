"""Features without a network, to compare encoders with: colour histograms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cytoray.errors import InputError
from cytoray.models.encoder import channels_first, load_encoder

BINS = 8


class ColourHistogram(nn.Module):
    """Square root of the joint histogram of red, green and blue: D = bins ** 3.

    Colour and staining of a cell, and nothing of its form; what an encoder must beat.

    Args:
        bins: of each channel.

    Attributes:
        embed_dim: D.
        encoder_id: tells it from encoders.
    """

    def __init__(self, bins: int = BINS) -> None:
        super().__init__()
        self.bins, self.embed_dim = bins, bins**3
        self.encoder_id = f"colour-histogram-{bins}"
        self.spec = SimpleNamespace(img_px=64)

    def forward(self, images: Tensor) -> Tensor:
        """(B, D) float32 of images uint8 (B, H, W, 3) or (B, 3, H, W); squares sum to 1."""
        if images.dtype != torch.uint8:
            raise InputError(f"a colour histogram needs uint8 images, not {images.dtype}")
        levels = channels_first(images).long() * self.bins // 256
        flat = (levels[:, 0] * self.bins + levels[:, 1]) * self.bins + levels[:, 2]
        flat = flat.flatten(1)
        counts = torch.zeros(len(flat), self.embed_dim, device=flat.device)
        counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
        return (counts / flat.shape[1]).sqrt()


BASELINES = {"colour-histogram": ColourHistogram}


def load_features_model(name: str, pretrained: bool = True) -> Any:
    """A baseline of `BASELINES` or an encoder: images to features, with `encoder_id` and `spec`.

    Raises:
        InputError: see `load_encoder`.
    """
    if name in BASELINES:
        return BASELINES[name]()
    return load_encoder(name, pretrained=pretrained)
