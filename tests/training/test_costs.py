from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cytoray.models.irpe import NUM_BUCKETS, _cached_buckets, _cached_maps
from cytoray.models.position_table import _weights
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    HeadConfig,
    PretrainConfig,
    PretrainEngine,
    SRConfig,
)
from cytoray.training.costs import peak_flops, step_costs

D, DEPTH, PATCH = 64, 2, 16
TINY = BackboneConfig(
    name="vit_tiny_patch16_224", kwargs={"depth": DEPTH, "embed_dim": D, "num_heads": 2}
)
HEAD = HeadConfig(out_dim=96, hidden_dim=48, bottleneck_dim=32)
RUN = PretrainConfig(
    method="dino",
    backbone=TINY,
    head=HEAD,
    crops=CropConfig(global_px=64, local_px=32, num_global=2, num_local=4),
    batch_size=4,
    total_steps=2000,
)


def crop_flops(side_px: int) -> int:
    """Forward pass of one crop by hand: a multiply-add is two operations."""
    patches = (side_px // PATCH) ** 2
    tokens = patches + 1
    embed = 2 * patches * 3 * PATCH * PATCH * D
    block = 24 * tokens * D * D + 4 * tokens * tokens * D
    head = 2 * (D * 48 + 48 * 48 + 48 * 32 + 32 * 96)
    return embed + DEPTH * block + head


def test_flops_are_those_counted_by_hand() -> None:
    student = 2 * crop_flops(64) + 4 * crop_flops(32)
    teacher = 2 * crop_flops(64)
    assert step_costs(RUN).flops_per_tile == 3 * student + teacher


def test_sr_attention_costs_its_tables_more_and_leaves_nothing_unreal_behind() -> None:
    changed = replace(RUN, backbone=replace(TINY, sr=SRConfig(sparse=True, irpe=True, top_h=4)))
    tokens = {side: (side // PATCH) ** 2 + 1 for side in (64, 32)}
    tables = {side: 3 * 2 * n * NUM_BUCKETS * D * DEPTH for side, n in tokens.items()}
    student = 3 * (2 * tables[64] + 4 * tables[32])
    for cached in (_cached_buckets, _cached_maps, _weights):
        cached.cache_clear()
    more = step_costs(changed).flops_per_tile - step_costs(RUN).flops_per_tile
    assert more == student + 2 * tables[64]  # the teacher goes forward alone
    batch = {"global_crops": torch.randn(4, 2, 3, 64, 64)}
    batch["local_crops"] = torch.randn(4, 4, 3, 32, 32)
    loss = PretrainEngine(changed, "cpu").step(batch, 0)["loss"]
    assert type(loss) is torch.Tensor
    assert float(loss) > 0


def test_masked_patches_go_through_the_head_too() -> None:
    masked = step_costs(replace(RUN, method="ibot")).flops_per_tile
    head = 2 * (D * 48 + 48 * 48 + 48 * 32 + 32 * 96)
    # Half of 2 global crops of 16 patches, 30 % of them on average; student and teacher
    assert masked - step_costs(RUN).flops_per_tile == pytest.approx(
        4 * head * 2 * 0.5 * 0.3 * 16, rel=1e-3
    )


@pytest.mark.parametrize("method", ["dinov2", "ibot", "dino", "simclr", "moco", "byol"])
def test_parameters_and_state_are_those_of_the_engine(method) -> None:
    local = 0 if method in ("simclr", "moco", "byol") else 4
    run = replace(RUN, method=method, crops=replace(RUN.crops, num_local=local))
    costs = step_costs(run)
    engine = PretrainEngine(run, "cpu")
    trained = [p for p in engine.method.student.parameters() if p.requires_grad]
    assert costs.num_parameters == sum(p.numel() for p in trained)
    held = sum(p.numel() for p in engine.method.parameters())
    assert costs.state_bytes == 4 * (held + 3 * costs.num_parameters)
    encoder = engine.method.encoder().vit
    assert costs.num_backbone_parameters == sum(p.numel() for p in encoder.parameters())


def test_activations_grow_with_precision_and_shrink_with_recomputing() -> None:
    small = step_costs(RUN, precision="bf16").activation_bytes_per_tile
    large = step_costs(RUN, precision="fp32").activation_bytes_per_tile
    assert small < large < 2 * small + 1
    spared = step_costs(replace(RUN, checkpoint_blocks=True)).activation_bytes_per_tile
    assert spared < small / 2
    costs = step_costs(RUN)
    assert costs.memory_bytes(5) == costs.state_bytes + 5 * small
    assert costs.memory_bytes(5, shards=4) == costs.state_bytes // 4 + 5 * small


def test_a_giant_is_described_without_its_memory() -> None:
    backbone = BackboneConfig(name="vit_giant_patch14_dinov2")
    run = PretrainConfig(backbone=backbone, crops=CropConfig(local_px=98))
    assert step_costs(run).num_backbone_parameters > 1.1e9


def test_no_peak_is_made_up() -> None:
    assert peak_flops(torch.device("cpu")) is None
