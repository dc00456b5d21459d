import copy
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers.attention import Attention
from torch import nn

from cytoray.errors import InputError
from cytoray.models.backbones import ViTBackbone
from cytoray.models.irpe import PatchGrids, bucket_index
from cytoray.models.lora import add_lora, merge_lora
from cytoray.models.sr_attention import sr_attention
from cytoray.models.sr_transformer import SRAttention, SRConfig, sr_config, use_sr

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
TABLES = ("rel_k", "rel_q", "rel_v")


def _vit(name="vit_tiny_patch16_224", px=64, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, img_size=px, dynamic_img_size=True, **(TINY | kwargs))


def _fill_tables(vit, std=0.5):
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(TABLES):
                parameter.normal_(std=std)
    return vit


def _gradients(vit, images):
    vit.zero_grad()
    out = vit.forward_features(images)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    return {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "px"),
    [
        ("vit_tiny_patch16_224", 64),
        ("vit_small_patch14_reg4_dinov2", 56),
        ("deit_tiny_distilled_patch16_224", 64),
    ],
)
@pytest.mark.parametrize("per_head", [False, True])
def test_zero_tables_and_all_keys_is_the_plain_vit(name, px, per_head):
    plain = _vit(name, px, **({"init_values": 1.0} if "dinov2" in name else {}))
    sr = use_sr(copy.deepcopy(plain), top_h=1000, per_head=per_head)
    tokens = torch.randn(2, 16 + plain.num_prefix_tokens, 32)
    block = sr.blocks[0](tokens), plain.blocks[0](tokens)
    torch.testing.assert_close(*block, atol=1e-6, rtol=1e-6)
    images = torch.randn(2, 3, px, px)
    whole = sr.forward_features(images), plain.forward_features(images)
    torch.testing.assert_close(*whole, atol=5e-6, rtol=1e-6)
    expected, got = _gradients(plain, images), _gradients(sr, images)
    for key, gradient in expected.items():
        error = (got[key] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, key
    added = {f"blocks.{i}.attn.{table}" for i in range(2) for table in TABLES}
    assert set(got) - set(expected) == added
    assert all(got[key].abs().max() > 0 for key in added)
    assert got["blocks.0.attn.rel_k"].shape == ((2, 50, 16) if per_head else (50, 16))
    plain.load_state_dict({k: v for k, v in sr.state_dict().items() if k not in added})


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_dinov3",
        "vit_base_patch16_rope_224",
        "eva02_tiny_patch14_224",
        "vit_base_patch16_rope_mixed_224",
    ],
)
def test_rotary_vits(name):
    px = 56 if "14" in name else 64
    plain = _vit(name, px)
    with torch.no_grad():
        for parameter in plain.parameters():  # LayerScale would hide the attention
            parameter.normal_(std=0.1)
    sr = use_sr(copy.deepcopy(plain), top_h=1000)
    images = torch.randn(2, 3, px, px)
    expected = plain.forward_features(images)
    torch.testing.assert_close(sr.forward_features(images), expected, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(_fill_tables(sr).forward_features(images), expected, atol=1e-2)
    assert set(plain.state_dict()) < set(sr.state_dict())


def test_parts_of_an_attention_are_kept():
    torch.manual_seed(0)
    plain = Attention(32, 2, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.3)
    sr = SRAttention(copy.deepcopy(plain), PatchGrids(1), SRConfig(irpe=True))
    x = torch.randn(2, 17, 32)
    torch.testing.assert_close(sr(x), plain(x), atol=1e-6, rtol=1e-5)


def test_switches_are_independent():
    images = torch.randn(2, 3, 64, 64)
    plain = _vit()
    off = use_sr(copy.deepcopy(plain), irpe=False, sparse=False)
    assert type(off.blocks[0].attn) is Attention
    assert sr_config(off) is None
    outs = {}
    for sparse, irpe in [(False, True), (True, False), (True, True)]:
        vit = use_sr(copy.deepcopy(plain), top_h=4, irpe=irpe, sparse=sparse)
        assert sr_config(vit) == SRConfig(sparse=sparse, irpe=irpe, top_h=4)
        assert any("rel_k" in key for key in vit.state_dict()) == irpe
        outs[sparse, irpe] = vit.forward_features(images)
    reference = plain.forward_features(images)
    torch.testing.assert_close(outs[False, True], reference, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(outs[True, True], outs[True, False], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(outs[True, False], reference, atol=1e-4)


def _slow_attention(attention, x, grid):
    """What `attention` should do with the tokens of one crop, by the definition."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    tables = (attention.rel_k, attention.rel_q, attention.rel_v)
    buckets = bucket_index(*grid, attention.grids.num_prefix)
    out = sr_attention(q, k, v, *tables, buckets, attention.config.top_h, attention.scale)
    return attention.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shape", [(64, 64), (32, 32), (32, 64), (64, 16)])
def test_each_image_shape_has_its_own_buckets(shape):
    vit = _fill_tables(use_sr(_vit(), top_h=3)).eval()
    seen = []
    attention = vit.blocks[0].attn
    attention.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        vit(torch.randn(2, 3, *shape))
        x, out = seen[0]
        expected = _slow_attention(attention, x, (shape[0] // 16, shape[1] // 16))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_packed_crops_are_separate_crops():
    vit = _fill_tables(use_sr(_vit(reg_tokens=1), top_h=3))
    attention = vit.blocks[0].attn
    crops = {(4, 4): 2, (2, 2): 3}
    attention.grids.note([grid for grid, count in crops.items() for _ in range(count)])
    parts = [
        torch.randn(2, 2 + grid[0] * grid[1], 32)
        for grid, count in crops.items()
        for _ in range(count)
    ]
    packed = attention(torch.cat(parts, dim=1))
    expected = torch.cat([attention(part) for part in parts], dim=1)
    torch.testing.assert_close(packed, expected, atol=1e-6, rtol=1e-5)


def test_mask_of_a_block():
    vit = _fill_tables(use_sr(_vit(), top_h=3)).eval()
    images = torch.randn(2, 3, 64, 64)
    everything = torch.ones(17, 17, dtype=torch.bool)
    torch.testing.assert_close(
        vit.forward_features(images, attn_mask=everything),
        vit.forward_features(images),
        atol=1e-5,
        rtol=1e-5,
    )
    with pytest.raises(InputError, match="is_causal"):
        vit.forward_features(images, is_causal=True)


def _two_crops_loss(vit, images):
    """As in pretraining: global crops, then local ones, then one backward pass."""
    small = images[..., :32, :32]
    return vit(images).square().sum() + vit(small).square().sum()


@pytest.mark.parametrize("way", ["timm", "backbone"])
def test_activation_checkpointing_with_two_crop_sizes(way):
    images = torch.randn(2, 3, 64, 64)
    plain = _fill_tables(use_sr(_vit(), top_h=3)).train()
    saving = copy.deepcopy(plain)
    _two_crops_loss(plain, images).backward()
    if way == "timm":
        saving.set_grad_checkpointing()
        _two_crops_loss(saving, images).backward()
    else:
        backbone = ViTBackbone(saving, checkpoint_blocks=True).train()
        _two_crops_loss(lambda x: backbone(x).cls, images).backward()
    for mine, reference in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, atol=1e-5, rtol=1e-5)


def test_bf16_autocast_is_near_fp32():
    vit = _fill_tables(use_sr(_vit(), irpe=True, sparse=False), std=0.1)
    images = torch.randn(2, 3, 64, 64)
    expected = vit(images)
    with torch.autocast("cpu", torch.bfloat16):
        got = vit(images)
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.05)
    got.float().square().sum().backward()
    attention = vit.blocks[0].attn
    assert attention.rel_q.grad.dtype == torch.float32
    assert attention.rel_q.grad.abs().max() > 0
    sparse = use_sr(_vit(), top_h=4)
    with torch.autocast("cpu", torch.bfloat16):
        sparse(images).float().square().sum().backward()
    assert sparse.blocks[0].attn.rel_v.grad.isfinite().all()


def test_a_teacher_is_a_copy_of_its_own():
    student = _fill_tables(use_sr(_vit(), top_h=3)).eval()
    teacher = pickle.loads(pickle.dumps(copy.deepcopy(student)))
    images = torch.randn(1, 3, 32, 64)
    assert torch.equal(teacher(images), student(images))
    grids = {id(b.attn.grids) for b in teacher.blocks}
    assert len(grids) == 1
    assert grids != {id(b.attn.grids) for b in student.blocks}
    with torch.no_grad():
        teacher.blocks[0].attn.rel_k.zero_()
    assert not torch.equal(teacher(images), student(images))


def test_weights_come_back_from_a_file(tmp_path):
    trained = _fill_tables(use_sr(_vit(), top_h=3)).eval()
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        again = use_sr(_vit(), top_h=3).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), trained(images))


def test_lora_on_an_sr_vit():
    vit = _fill_tables(use_sr(_vit(), top_h=3)).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = vit(images)
    names = set(vit.state_dict())
    adapted = add_lora(vit, rank=2)
    torch.testing.assert_close(adapted(images), expected, atol=1e-6, rtol=1e-5)
    assert set(merge_lora(adapted)) == names


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("resnet18", "it has no attention"),
        ("swin_tiny_patch4_window7_224", "windows"),
        ("vit_relpos_small_patch16_224", "RelPosAttention scores tokens in a way of its own"),
    ],
)
def test_backbones_that_cannot_have_it(name, why):
    with torch.device("meta"):
        model = timm.create_model(name)
    before = {key for key, _ in model.named_modules()}
    with pytest.raises(InputError, match=why) as error:
        use_sr(model)
    assert type(model).__name__ in str(error.value)
    assert {key for key, _ in model.named_modules()} == before


def test_bad_settings():
    with pytest.raises(InputError, match="top_h is 0"):
        use_sr(_vit(), top_h=0)
    with pytest.raises(InputError, match="form 'fastest' is none of auto, torch, plain"):
        use_sr(_vit(), form="fastest")
    with pytest.raises(InputError, match="already"):
        use_sr(use_sr(_vit()))
    with pytest.raises(InputError, match="attn_drop_rate=0"):
        use_sr(_vit(attn_drop_rate=0.1))
    with pytest.raises(InputError, match="patch_drop_rate=0"):
        use_sr(_vit(patch_drop_rate=0.5))
    assert sr_config(use_sr(_vit(patch_drop_rate=0.5), irpe=False)) is not None


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [("aot_eager", (17, 7)), pytest.param("inductor", (17,), marks=pytest.mark.slow)],
)
def test_compiled_attention(backend, sizes):
    torch.manual_seed(0)
    config = SRConfig(sparse=True, irpe=True, top_h=4)
    attention = _fill_tables(SRAttention(Attention(32, 2), PatchGrids(1), config))
    attention.grids.note([(2, 3)])
    compiled = torch.compile(copy.deepcopy(attention), fullgraph=True, backend=backend)
    for tokens in sizes:
        x = torch.randn(2, tokens, 32)
        expected, got = attention(x), compiled(x)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        expected.square().sum().backward()
        got.square().sum().backward()
    for mine, reference in zip(compiled.parameters(), attention.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, atol=1e-5, rtol=1e-4)
