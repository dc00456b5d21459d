"""From a `PretrainConfig` to the modules of a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cytoray.models.backbones import ViTBackbone, build_backbone, default_drop_path
from cytoray.models.encoder import read_encoder
from cytoray.models.heads import DINOHead
from cytoray.ssl.dino_network import DINONetwork, LossSettings
from cytoray.ssl.masks import MaskPolicy
from cytoray.ssl.self_distillation import SelfDistillation

if TYPE_CHECKING:
    from cytoray.training.config import HeadConfig, PretrainConfig


def configured_backbone(config: PretrainConfig) -> ViTBackbone:
    """The student's backbone: random, timm's weights, or those of a saved encoder."""
    chosen = config.backbone
    weights = read_encoder(chosen.init_from)[0] if chosen.init_from else None
    return build_backbone(
        chosen.name,
        img_px=config.crops.global_px,
        pretrained=chosen.pretrained and weights is None,
        weights=weights,
        kwargs=chosen.kwargs,
        sr=chosen.sr,
        checkpoint_blocks=config.checkpoint_blocks,
    )


def configured_drop_path(config: PretrainConfig, embed_dim: int) -> float:
    """The configured drop path, else the one that fits the width."""
    chosen = config.backbone.drop_path
    return default_drop_path(embed_dim) if chosen is None else chosen


def configured_head(config: HeadConfig, embed_dim: int) -> DINOHead:
    """A projection head of the configured sizes."""
    return DINOHead(
        embed_dim,
        config.out_dim,
        hidden_dim=config.hidden_dim,
        bottleneck_dim=config.bottleneck_dim,
        num_layers=config.num_layers,
    )


def build_self_distillation(
    config: PretrainConfig, *, ibot_weight: float, koleo_weight: float, centering: str
) -> SelfDistillation:
    """Student, teacher and losses; the keywords fill what the configuration leaves as None.

    Weights are drawn from torch's global generator.
    """
    backbone = configured_backbone(config)
    width = backbone.embed_dim
    loss = config.loss
    ibot_weight = ibot_weight if loss.ibot_weight is None else loss.ibot_weight
    cls_head = configured_head(config.head, width)
    separate = config.head.separate_ibot and ibot_weight != 0
    patch_head = configured_head(config.head, width) if separate else None
    return SelfDistillation(
        DINONetwork(backbone, cls_head, patch_head),
        out_dim=config.head.out_dim,
        settings=LossSettings(
            dino_weight=loss.dino_weight,
            ibot_weight=ibot_weight,
            koleo_weight=koleo_weight if loss.koleo_weight is None else loss.koleo_weight,
            student_temp=loss.student_temp,
            centering=loss.centering or centering,
            centre_momentum=loss.centre_momentum,
            masks=MaskPolicy(
                share=loss.mask_share,
                ratio_min=loss.mask_ratio_min,
                ratio_max=loss.mask_ratio_max,
            ),
        ),
        drop_path=configured_drop_path(config, width),
        seed=config.seed,
    )
