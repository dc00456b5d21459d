"""Named runs: configurations as values, started with `cytoray <job> <name> --index ... --out ...`.

A named run sets what its paper or purpose fixes; flags still win. `tyro.MISSING` marks what the
user must give.
"""

from __future__ import annotations

from typing import Any

import tyro

from cytoray.training import CropConfig, HeadConfig, LossConfig, OptimConfig, PretrainConfig
from pipelines.pretrain import Config as Pretrain

SMOKE = Pretrain(
    index=tyro.MISSING,
    out=tyro.MISSING,
    ssl=PretrainConfig(
        crops=CropConfig(global_px=96, local_px=48, num_global=2, num_local=4),
        head=HeadConfig(out_dim=256, hidden_dim=512, bottleneck_dim=128),
        loss=LossConfig(centering="centering", teacher_temp=0.04),
        optim=OptimConfig(
            lr=6e-3,
            warmup_steps=20,
            freeze_last_layer_steps=10,
            layer_decay=1.0,
            patch_embed_lr_mult=1.0,
            ema=0.98,
        ),
        batch_size=32,
        total_steps=100,
    ),
    checkpoint_every=25,
    log_every=5,
    shuffle_chunks=8,
)
"""DINOv2, ViT-tiny/16 on 96 px crops, a few minutes on two cores. Few prototypes, sharp targets and
a fast teacher, so that a hundred steps from random weights already teach it something; it shows
that the chain works and is no foundation model."""

NAMED: dict[str, dict[str, Any]] = {"pretrain": {"smoke": SMOKE}}
