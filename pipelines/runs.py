"""Named runs: configurations as values, started with `cytoray <job> <name> --index ... --out ...`.

A named run sets what its paper or purpose fixes; flags still win. `tyro.MISSING` marks what the
user must give.
"""

from __future__ import annotations

from typing import Any

import tyro

from cytoray.finetune import TrainConfig
from cytoray.mil import MILConfig
from cytoray.models.sr_transformer import SRConfig
from cytoray.perturb import PerturbConfig
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    HeadConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
)
from pipelines.finetune import Config as Finetune
from pipelines.pretrain import Config as Pretrain
from pipelines.tune import Config as Tune

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
that the chain works and is no foundation model. 4.7 GFLOP a tile, 15 TFLOP in all; the numbers are
ours."""

CYTOFM = Pretrain(
    index=tyro.MISSING,
    out=tyro.MISSING,
    ssl=PretrainConfig(
        method="ibot",
        backbone=BackboneConfig(name="vit_base_patch16_224", drop_path=0.1),
        crops=CropConfig(num_local=10),
        head=HeadConfig(out_dim=8192),
        loss=LossConfig(
            teacher_temp=0.04,
            teacher_patch_temp=0.07,
            teacher_temp_warmup_steps=15_000,
            mask_ratio_min=0.1,
            mask_ratio_max=0.5,
        ),
        optim=OptimConfig(
            lr=2e-3,  # the published 5e-4 x batch / 256
            warmup_steps=5000,
            freeze_last_layer_steps=1000,
            layer_decay=1.0,
            patch_embed_lr_mult=1.0,
            ema=0.996,
        ),
        batch_size=1024,
        total_steps=100_000,
    ),
    perturb=PerturbConfig(enabled=False),
    workers=8,
)
"""CytoFM (2025): iBOT, ViT-B/16, 2 x 224 and 10 x 96 px crops, shared head of 8192 prototypes,
moving centre, weight decay 0.04 to 0.4, teacher temperature 0.04, for patches 0.04 to 0.07 over
three times the warm-up (30 and 10 epochs there).
Batch and steps are iBOT's; the paper gives neither. 477 GFLOP a tile, 102 million tiles: 4.9e19
FLOP, 14 hours at a sustained PFLOP/s; at least 31 GiB a worker."""

CYTOSSL = Pretrain(
    index=tyro.MISSING,
    out=tyro.MISSING,
    ssl=PretrainConfig(
        method="dino",
        backbone=BackboneConfig(
            name="vit_tiny_patch16_224", sr=SRConfig(sparse=True, irpe=True, top_h=16)
        ),
        optim=OptimConfig(
            lr=1e-3,  # a peak of 5e-4 at this batch
            warmup_steps=5000,
            weight_decay=0.0,
            weight_decay_end=0.0,
            layer_decay=1.0,
            patch_embed_lr_mult=1.0,
            ema=0.996,
        ),
        batch_size=256,
        total_steps=100_000,
    ),
    perturb=PerturbConfig(enabled=True, radius_um=12.5),
)
"""Cyto-SSL (AAAI 2026): DINO, ViT-tiny, Nuclei-Centred Perturbation with r = 50 px at 40x, and the
SR-Transformer with h = 16; learning rate 5e-4, cosine. Trained there on 2.5 million 40x tiles:
index with --magnification 40. Batch and steps are not given in the paper. 33 GFLOP a tile, 26
million tiles: 8.5e17 FLOP, a quarter of an hour at a sustained PFLOP/s, hours on one real GPU."""

UNICAS = Pretrain(
    index=tyro.MISSING,
    out=tyro.MISSING,
    ssl=PretrainConfig(
        method="dinov2",
        backbone=BackboneConfig(name="vit_large_patch16_224"),
        optim=OptimConfig(
            lr=3.4641e-4,  # a peak of 3e-4 at this batch
            warmup_steps=10_000,
        ),
        batch_size=768,
        total_steps=1_000_000,
    ),
    perturb=PerturbConfig(enabled=False),
    workers=8,
    checkpoint_every=5000,
)
"""UniCAS (2025): DINOv2, ViT-L/16, batch 768 on 8 A100, learning rate 3e-4, a million steps, on 80
million tiles of 48,532 slides: index with --tile-px 256 --magnification 20. About 1,540 GFLOP a
tile, so 768 million tiles are some 1.2e21 FLOP: 330 hours at a sustained PFLOP/s. At least 61 GiB
a worker; `--ssl.checkpoint-blocks` where that is too much."""

CYTOSSL_TABLE1 = Tune(
    bags=tyro.MISSING,
    index=tyro.MISSING,
    out=tyro.MISSING,
    aggregators=("abmil", "transmil", "dtfd", "clam", "dsmil", "less"),
    lora_ranks=(0,),
    published=True,
    val_fraction=0.15,
    test_fraction=0.3,
)
"""Cyto-SSL (AAAI 2026), Table 1: encoders x six aggregators, each with the settings it was
published with, 70 % of the slides to train on and 30 % to test. Give one --bags folder for each
encoder to compare; there 100 tiles of 512 px a slide. The paper gives no validation part and no
intervals; here a part of the 70 % chooses the epoch, and patients stay whole."""

UNICAS_TASKS = Tune(
    bags=tyro.MISSING,
    index=tyro.MISSING,
    out=tyro.MISSING,
    label=("cancer", "candidiasis", "clue_cells"),
    aggregators=("unicas",),
    lora_ranks=(0,),
    published=True,
    mil=MILConfig(aggregator="unicas", epochs=30),
)
"""UniCAS (2025), slide level: cancer screening, candidiasis and clue cells by one head. Name your
own columns with --label; a slide may lack any of them. Epochs are not given in the paper."""

_DAUSORT_TRAINING = TrainConfig(
    steps_per_shot=100,
    epochs=100,
    warmup_steps=50,
    batch=32,
    weight_decay=1e-2,
    min_lr=1e-6,
    augmentation="crops",
    select="last",
    evaluations=1,
)

DAUSORT = Finetune(
    cells=tyro.MISSING,
    out=tyro.MISSING,
    encoders=("clip", "quilt", "biomedclip", "uni", "vit"),
    adapters=("linear", "lora"),
    shots=(1, 2, 4, 8, 16, 50),
    shares=(1.0,),
    seeds=(1, 2, 3),
    lrs=(1e-2, 3e-3, 1e-3, 3e-4, 1e-4),
    train=_DAUSORT_TRAINING,
    fit="crop",
)
"""Dausort et al. (2024), experiments 1 and 2: five encoders, a linear classifier and LoRA of rank 2
on query and value (alpha 1, dropout 0.25), 1 to 50 images of each class and all of them, batch 32,
mean over three seeds, the learning rate chosen on validation for every encoder and amount. The
paper gives no more; learning rates, 100 steps a shot (100 epochs on all data) after 50 of warm-up,
AdamW with weight decay 1e-2, cosine to 1e-6, random resized crops (0.08 to 1) with mirroring, and
the last state are those of the released code. 1,050 trials; UNI is gated, QUILT and BiomedCLIP need
`pip install cytoray[clip]`."""

DAUSORT_PROPORTIONS = Finetune(
    cells=tyro.MISSING,
    out=tyro.MISSING,
    encoders=("clip-l14",),
    adapters=("lora16",),
    shots=(),
    shares=(0.05, 0.1, 0.25, 0.5, 0.7, 1.0),
    seeds=(1, 2, 3),
    lrs=(1e-2, 3e-3, 1e-3, 3e-4, 1e-4),
    train=_DAUSORT_TRAINING,
    fit="crop",
)
"""Dausort et al. (2024), experiment 3: CLIP ViT-L/14 with LoRA of rank 16 on query, key, value and
output, on 5 to 100 % of the data (3.1 million trained parameters; 80.23 % on HiCervix's 25 classes
with all of it, the state of the art from 70 %)."""

NAMED: dict[str, dict[str, Any]] = {
    "pretrain": {"smoke": SMOKE, "cytofm": CYTOFM, "cytossl": CYTOSSL, "unicas": UNICAS},
    "tune": {"cytossl-table1": CYTOSSL_TABLE1, "unicas-tasks": UNICAS_TASKS},
    "finetune": {"dausort": DAUSORT, "dausort-proportions": DAUSORT_PROPORTIONS},
}
