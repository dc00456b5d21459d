"""timm's ResNets as backbone: one feature a crop, the average of the last map.

Shapes: B crops, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from cytoray.errors import InputError
from cytoray.models.backbones import CropGroup, Tokens
from cytoray.models.drop_path import DropRows

STAGES = 4
STRIDE_PX = 32  # from a place of the last map to the next


class ConvBackbone(nn.Module):
    """A timm ResNet with the interface of `ViTBackbone`; there are no tokens to hide or to drop.

    Args:
        net: the timm model; `encoder_weights` has timm's own keys.
        checkpoint_blocks: recompute the stages in the backward pass to save memory. Batch norm
            must not see a batch twice, so this is refused.

    Raises:
        InputError: `checkpoint_blocks`.
    """

    is_transformer = False

    def __init__(self, net: ResNet, *, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        if checkpoint_blocks:
            raise InputError(
                "checkpoint_blocks would update the running averages of batch norm twice a step; "
                "leave it off with a ResNet"
            )
        self.net = net
        self.mask_token = nn.Parameter(torch.zeros(0), requires_grad=False)  # nothing is masked
        self.pack = False
        self.compile_backend: str | None = None
        self._is_compiled = False

    @property
    def model(self) -> nn.Module:
        """The timm model."""
        return self.net

    @property
    def embed_dim(self) -> int:
        """Width D of the feature."""
        return int(self.net.num_features)

    @property
    def depth(self) -> int:
        """Number of stages: layers of the layer-wise learning rate."""
        return STAGES

    @property
    def patch_px(self) -> int:
        """Pixels from a place of the last map to the next."""
        return STRIDE_PX

    def forward(
        self, images: Tensor, mask: Tensor | None = None, drop: DropRows | None = None
    ) -> Tokens:
        """Encode crops of any size from 32 px on; there is neither mask nor drop path.

        Returns:
            `cls` (B, D): the average of the last map; `patches` (B, 0, D).
        """
        assert mask is None
        assert drop is None
        if self.compile_backend is not None and not self._is_compiled:
            self.net.compile(backend=self.compile_backend)
            self._is_compiled = True
        feature: Any = self.net(images)
        return Tokens(feature, feature.new_empty(feature.shape[0], 0, feature.shape[1]))

    def encode(self, groups: Sequence[CropGroup]) -> list[Tokens]:
        """Encode crops of several sizes, one after the other."""
        found = [self(group.images, group.mask, group.drop) for group in groups]
        return [
            tokens if group.patches is None else Tokens(tokens.cls, tokens.patches.flatten(0, 1))
            for tokens, group in zip(found, groups, strict=True)
        ]

    def freeze_patches(self) -> None:
        """There is no patch projection."""

    def encoder_weights(self) -> dict[str, Tensor]:
        """Weights under timm's own keys."""
        return self.net.state_dict()
