"""From a `PretrainConfig` to the modules of a method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from cytoray.models.backbones import (
    Backbone,
    backbone_facts,
    build_backbone,
    default_drop_path,
)
from cytoray.models.heads import DINOHead
from cytoray.models.starting_weights import read_start
from cytoray.ssl.batch_norm import norm_over_ranks
from cytoray.ssl.dino_network import DINONetwork, LossSettings
from cytoray.ssl.masks import MaskPolicy
from cytoray.ssl.self_distillation import SelfDistillation

if TYPE_CHECKING:
    from cytoray.training.config import HeadConfig, PretrainConfig


def configured_backbone(config: PretrainConfig) -> Backbone:
    """The student's backbone: random, timm's weights, or those of an encoder or file.

    On the meta device, where there are no values, no weights are read.
    """
    chosen = config.backbone
    has_values = torch.get_default_device().type != "meta"
    weights = read_start(chosen.init_from) if chosen.init_from and has_values else None
    backbone = build_backbone(
        chosen.name,
        img_px=config.crops.global_px,
        pretrained=chosen.pretrained and not chosen.init_from and has_values,
        weights=weights,
        kwargs=chosen.kwargs,
        sr=chosen.sr,
        lora=chosen.lora,
        checkpoint_blocks=config.checkpoint_blocks,
    )
    norm_over_ranks(backbone)
    return backbone


def configured_drop_path(config: PretrainConfig, embed_dim: int) -> float:
    """The configured drop path, else the one that fits the width; 0 for a ResNet or LoRA."""
    chosen = config.backbone
    if chosen.drop_path is not None:
        return chosen.drop_path
    facts = backbone_facts(chosen.name, tuple(sorted(chosen.kwargs.items())))
    plain = chosen.lora.rank or not facts.is_transformer
    return 0.0 if plain else default_drop_path(embed_dim)


def configured_head(config: HeadConfig, embed_dim: int) -> DINOHead:
    """A projection head of the configured sizes."""
    return DINOHead(
        embed_dim,
        config.out_dim,
        hidden_dim=config.hidden_dim,
        bottleneck_dim=config.bottleneck_dim,
        num_layers=config.num_layers,
    )


def _patch_teacher_temp(config: PretrainConfig) -> Callable[[int], float] | None:
    if config.loss.teacher_patch_temp is None:
        return None
    from cytoray.training.schedules import patch_teacher_temp  # which itself imports the methods

    return partial(patch_teacher_temp, config)


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
            patch_teacher_temp=_patch_teacher_temp(config),
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
