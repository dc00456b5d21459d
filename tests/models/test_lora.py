import math

import pytest
import timm
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from cytoray.errors import InputError
from cytoray.models.lora import (
    SplitQKV,
    add_lora,
    load_lora_state,
    lora_layers,
    lora_state_dict,
    merge_lora,
    set_lora_training,
    split_qkv,
    trainable_parameters,
)
from cytoray.models.sr_transformer import SR_TABLES, use_sr


def make_vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**options, **kwargs})
    return vit.eval()


def images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def shake(vit, scale=0.2):
    """Give B (and A) values as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(vit).values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}, {"qkv_bias": False}])
@pytest.mark.parametrize("fused_attention", [True, False])
def test_split_model_equals_the_plain_one(kwargs, fused_attention):
    vit = make_vit(**kwargs)
    for block in vit.blocks:
        block.attn.fused_attn = fused_attention
    plain = vit(images())
    assert split_qkv(vit) is vit
    assert all(isinstance(block.attn.qkv, SplitQKV) for block in vit.blocks)
    assert torch.allclose(vit(images()), plain, atol=1e-6, rtol=0)
    assert torch.allclose(split_qkv(vit)(images()), plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [0, 2])
def test_rank_0_and_zero_b_equal_the_plain_model(rank):
    vit = make_vit()
    plain = vit(images())
    add_lora(vit, rank)
    assert torch.allclose(vit(images()), plain, atol=1e-6, rtol=0)
    trainable = trainable_parameters(vit)
    assert len(trainable) == (0 if rank == 0 else 2 * 2 * 2)
    assert all("lora_" in name for name in trainable)
    assert sum(p.numel() for p in trainable.values()) == 2 * 2 * (2 * rank * 48)


def test_q_and_v_have_their_own_a_and_k_never_changes():
    vit = add_lora(make_vit(), 2)
    before = merge_lora(vit)
    layers = lora_layers(vit)
    assert sorted(layers) == [f"blocks.{b}.attn.qkv.{t}" for b in (0, 1) for t in ("q", "v")]
    matrices = [layer.lora_A["default"].weight for layer in layers.values()]
    assert len({matrix.data_ptr() for matrix in matrices}) == 4
    assert not torch.equal(matrices[0], matrices[1])
    shake(vit)
    change = merge_lora(vit)["blocks.0.attn.qkv.weight"] - before["blocks.0.attn.qkv.weight"]
    q, k, v = change.split(48)
    assert not bool(k.any())
    together = torch.cat([q, v])
    assert int(torch.linalg.matrix_rank(q)) == int(torch.linalg.matrix_rank(v)) == 2
    assert int(torch.linalg.matrix_rank(together)) == 4  # a shared A could give 2 at most


def test_adapting_the_fused_linear_shows_the_trap():
    """What the split avoids: peft on timm's own qkv gives q, k and v one A, and changes k."""
    vit = make_vit()
    before = vit.blocks[0].attn.qkv.weight.clone()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["qkv"]), vit)
    shake(vit)
    change = vit.blocks[0].attn.qkv.get_delta_weight("default")
    assert change.shape == before.shape
    assert bool(change.split(48)[1].any())
    assert int(torch.linalg.matrix_rank(change)) == 2


def test_scale_is_alpha_over_root_rank():
    vit = add_lora(make_vit(), 4, alpha=3.0)
    for layer in lora_layers(vit).values():
        assert layer.scaling["default"] == pytest.approx(3.0 / math.sqrt(4))
        assert not bool(layer.lora_B["default"].weight.any())
        bound = 1 / math.sqrt(48)  # Kaiming uniform with a = sqrt(5)
        assert 0.5 * bound < layer.lora_A["default"].weight.detach().abs().max().item() <= bound


@pytest.mark.parametrize("targets", [("q", "v"), ("q", "k", "v", "o"), ("o",)])
@pytest.mark.parametrize("kwargs", [{}, {"qkv_bias": False, "qk_norm": True}])
def test_merged_weights_equal_the_adapted_model_under_timms_keys(targets, kwargs):
    vit = make_vit(**kwargs)
    plain, keys = vit(images()), list(vit.state_dict())
    add_lora(vit, 2, targets=targets)
    shake(vit)
    adapted = vit(images())
    merged = merge_lora(vit)
    assert list(merged) == keys
    fresh = make_vit(seed=9, **kwargs)
    fresh.load_state_dict(merged)
    assert torch.allclose(fresh(images()), adapted, atol=1e-5, rtol=0)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    assert torch.equal(vit(images()), adapted)


def test_merge_of_a_plain_model_is_its_state_dict():
    vit = add_lora(make_vit(), 0)
    state = vit.state_dict()
    merged = merge_lora(vit)
    assert list(merged) == list(state)
    assert all(torch.equal(merged[key], state[key]) for key in state)


def test_only_lora_learns_and_its_state_can_be_moved():
    vit = add_lora(make_vit(), 2)
    frozen = {n: p.clone() for n, p in vit.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.AdamW(trainable_parameters(vit).values(), lr=0.1)
    vit(images()).square().mean().backward()
    optimiser.step()
    assert all(torch.equal(dict(vit.named_parameters())[n], p) for n, p in frozen.items())
    other = add_lora(make_vit(), 2)
    assert not torch.allclose(other(images()), vit(images()))
    load_lora_state(other, lora_state_dict(vit))
    assert torch.equal(other(images()), vit(images()))
    with pytest.raises(InputError, match="ranks"):
        load_lora_state(add_lora(make_vit(), 3), lora_state_dict(vit))
    with pytest.raises(InputError, match="do not fit"):
        load_lora_state(add_lora(make_vit(), 2, targets=("q",)), lora_state_dict(vit))


def test_dropout_is_on_only_when_asked_for():
    vit = add_lora(make_vit(), 2, dropout=0.5)
    shake(vit)
    assert torch.equal(vit(images()), vit(images()))
    set_lora_training(vit, True)
    assert not torch.equal(vit(images()), vit(images()))
    set_lora_training(vit, False)
    assert torch.equal(vit(images()), vit(images()))


def test_what_cannot_be_adapted_is_said():
    with pytest.raises(InputError, match="one `qkv` Linear"):
        add_lora(timm.create_model("resnet10t", num_classes=0), 2)
    with pytest.raises(InputError, match="valid: k, mlp, o, q, v"):
        add_lora(make_vit(), 2, targets=("query",))
    with pytest.raises(InputError, match="negative"):
        add_lora(make_vit(), -1)
    with pytest.raises(InputError, match="at least one target"):
        add_lora(make_vit(), 1, targets=())
    with pytest.raises(InputError, match="already"):
        add_lora(add_lora(make_vit(), 1), 1)


@pytest.mark.parametrize(
    ("targets", "widths"),
    [
        (("q", "v"), [(48, 48)] * 2),
        (("q", "k", "v", "o"), [(48, 48)] * 4),
        (("mlp",), [(48, 192), (192, 48)]),
        (("q", "k", "v", "o", "mlp"), [(48, 48)] * 4 + [(48, 192), (192, 48)]),
    ],
)
@pytest.mark.parametrize("rank", [1, 2, 16])
@pytest.mark.parametrize("last_blocks", [0, 1])
def test_trained_parameters_are_those_of_the_formula(targets, widths, rank, last_blocks):
    """A is (r, in), B is (out, r): r * (in + out) for each Linear of each adapted block."""
    vit = add_lora(make_vit(), rank, targets=targets, last_blocks=last_blocks)
    blocks = last_blocks or 2
    expected = blocks * sum(rank * (fan_in + fan_out) for fan_in, fan_out in widths)
    assert sum(value.numel() for value in trainable_parameters(vit).values()) == expected
    first = min(int(name.split(".")[1]) for name in lora_layers(vit))
    assert first == 2 - blocks


@pytest.mark.parametrize("rank", [0, 2])
def test_an_sr_backbone_is_adapted_and_merged_back(rank):
    def make(seed):
        vit = use_sr(make_vit(seed), top_h=6)
        for name, table in vit.named_parameters():
            if name.rsplit(".", 1)[-1] in SR_TABLES:
                nn.init.normal_(table, std=0.3, generator=torch.Generator().manual_seed(3))
        return vit.eval()

    vit = make(0)
    plain, keys = vit(images()), list(vit.state_dict())
    add_lora(vit, rank, targets=("q", "k", "v", "o", "mlp"))
    assert torch.allclose(vit(images()), plain, atol=1e-6, rtol=0)
    if not rank:
        return
    assert not any(name.rsplit(".", 1)[-1] in SR_TABLES for name in trainable_parameters(vit))
    shake(vit)
    adapted, merged = vit(images()), merge_lora(vit)
    assert list(merged) == keys
    fresh = make(9)
    fresh.load_state_dict(merged)
    assert torch.allclose(fresh(images()), adapted, atol=1e-5, rtol=0)
    assert not torch.allclose(adapted, plain, atol=1e-2)


def test_more_blocks_than_there_are_is_said():
    with pytest.raises(InputError, match="last 3 blocks: VisionTransformer has 2; 0 means all"):
        add_lora(make_vit(), 1, last_blocks=3)
