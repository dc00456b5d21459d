import pytest
import torch
from torch import nn

from cytoray.models.backbones import build_backbone
from cytoray.models.heads import DINOHead
from cytoray.ssl.self_distillation import DINONetwork
from cytoray.training.optim import (
    apply_schedule,
    build_optimizer,
    clip_per_module,
    decays,
    layer_of,
    parameter_groups,
)
from cytoray.training.schedules import StepValues


@pytest.fixture
def student():
    kwargs = {"depth": 3, "embed_dim": 32, "num_heads": 2, "init_values": 1e-5}
    backbone = build_backbone("vit_small_patch14_reg4_dinov2", img_px=28, kwargs=kwargs)
    return DINONetwork(backbone, DINOHead(32, 20, hidden_dim=16, bottleneck_dim=8), None)


def _by_name(student, groups):
    of = {id(p): g for g in groups for p in g["params"]}
    return {n: of[id(p)] for n, p in student.named_parameters()}


def test_layer_decay_and_patch_embedding(student):
    groups = parameter_groups(student, depth=3, layer_decay=0.9, patch_embed_lr_mult=0.2)
    rate = {n: g["lr_mult"] for n, g in _by_name(student, groups).items()}
    vit = "backbone.vit."
    assert rate[vit + "patch_embed.proj.weight"] == pytest.approx(0.9**4 * 0.2)
    for name in ("cls_token", "pos_embed", "reg_token"):
        assert rate[vit + name] == pytest.approx(0.9**4)
    assert rate["backbone.mask_token"] == pytest.approx(0.9**4)
    for block in range(3):
        assert rate[vit + f"blocks.{block}.attn.qkv.weight"] == pytest.approx(0.9 ** (3 - block))
    assert rate[vit + "norm.weight"] == rate["cls_head.mlp.0.weight"] == 1.0
    assert layer_of("backbone.vit.blocks.11.mlp.fc1.bias", 12) == 12


def test_weight_decay_skips_biases_norms_and_gammas_only(student):
    groups = parameter_groups(student, depth=3, layer_decay=0.9, patch_embed_lr_mult=0.2)
    skipped = {n for n, g in _by_name(student, groups).items() if g["wd_mult"] == 0}
    expected = {
        n for n, p in student.named_parameters() if n.endswith((".bias", ".gamma")) or ".norm" in n
    }
    assert skipped == expected
    assert not decays("backbone.vit.blocks.0.ls1.gamma")
    assert decays("backbone.vit.pos_embed")
    assert decays("cls_head.last_layer.weight")


def test_every_trained_parameter_is_in_one_group(student):
    student.backbone.mask_token.requires_grad_(False)
    groups = parameter_groups(student, depth=3, layer_decay=0.9, patch_embed_lr_mult=0.2)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in student.parameters() if p.requires_grad)


def test_schedule_reaches_the_groups_and_freezes_the_last_layer(student):
    groups = parameter_groups(student, depth=3, layer_decay=0.9, patch_embed_lr_mult=0.2)
    optimizer = build_optimizer(groups, beta1=0.9, beta2=0.999)
    values = {"lr": 0.1, "weight_decay": 0.3, "ema": 0.99, "teacher_temp": 0.04}
    for frozen in (True, False):
        apply_schedule(optimizer, StepValues(**values, last_layer_frozen=frozen))
        groups_now = _by_name(student, optimizer.param_groups)
        last = groups_now["cls_head.last_layer.weight"]
        assert last["lr"] == (0.0 if frozen else 0.1)
        block = groups_now["backbone.vit.blocks.0.attn.qkv.weight"]
        assert block["lr"] == pytest.approx(0.1 * 0.9**3)
        assert block["weight_decay"] == 0.3
        assert groups_now["backbone.vit.norm.bias"]["weight_decay"] == 0.0


def test_clip_is_per_module():
    big, small = nn.Linear(3, 3), nn.Linear(3, 3)
    for module, size in ((big, 10.0), (small, 0.01)):
        for p in module.parameters():
            p.grad = torch.full_like(p, size)
    norms = clip_per_module({"big": [*big.parameters()], "small": [*small.parameters()]}, 3.0)
    assert norms["grad_norm_big"].item() == pytest.approx(10 * 12**0.5)
    clipped = torch.cat([p.grad.flatten() for p in big.parameters() if p.grad is not None])
    assert clipped.norm().item() == pytest.approx(3.0, rel=1e-4)
    assert small.bias.grad is not None
    assert torch.equal(small.bias.grad, torch.full((3,), 0.01))
    clip_per_module({"small": [*small.parameters()]}, 0.0)
    assert torch.equal(small.bias.grad, torch.full((3,), 0.01))
