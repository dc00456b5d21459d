"""DINOv3 and EVA ViTs, ResNets, LoRA, and the weights a backbone starts from."""

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file

from cytoray.errors import InputError
from cytoray.models.backbones import CropGroup, LoRAChoice, backbone_facts, build_backbone
from cytoray.models.conv_backbone import ConvBackbone
from cytoray.models.drop_path import DropRows
from cytoray.models.rotary_backbone import RotaryBackbone
from cytoray.models.starting_weights import read_start

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 2}
ROTARY = ["vit_small_patch16_dinov3", "vit_base_patch16_rope_mixed_224", "eva02_tiny_patch14_224"]


def _build(name, img_px=64, seed=0, **options):
    torch.manual_seed(seed)
    kwargs = {} if name.startswith("resnet") else dict(TINY)
    backbone = build_backbone(name, img_px=img_px, kwargs=kwargs, **options)
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            if "gamma" in key:  # LayerScale would hide the branches
                parameter.fill_(0.7)
    return backbone


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_tokens_are_timms(name):
    px = 56 if "14" in name else 64
    backbone = _build(name, px).eval()
    assert type(backbone) is RotaryBackbone
    for shape in ((px, px), (px // 2, px // 2), (px // 2, px)):
        images = torch.randn(2, 3, *shape)
        expected = backbone.vit.forward_features(images)
        tokens = backbone(images)
        # Positions resampled by a product of matrices are timm's to rounding.
        parts = expected[:, 0], expected[:, backbone.vit.num_prefix_tokens :]
        for part, theirs in zip((tokens.cls, tokens.patches), parts, strict=True):
            torch.testing.assert_close(part, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ROTARY[:2])
@pytest.mark.parametrize("recompute", [False, True])
def test_rotary_drop_path_is_a_scaled_subset(name, recompute):
    backbone = _build(name, checkpoint_blocks=recompute).train()
    vit = backbone.vit
    big, small = torch.randn(4, 3, 64, 64), torch.randn(2, 3, 32, 32)
    rows = [
        [(torch.tensor([0, 2]), torch.tensor([1, 2])), (torch.tensor([3]), torch.tensor([0]))],
        [(torch.tensor([1]), torch.tensor([0])), (torch.tensor([0]), torch.tensor([1]))],
    ]
    groups = [
        CropGroup(images, drop=DropRows(its, 2.0))
        for images, its in zip((big, small), rows, strict=True)
    ]
    for pack in (False, True):
        backbone.pack = pack
        out = backbone.encode(groups)
        for tokens, group in zip(out, groups, strict=True):
            expected = _dropped(vit, group)
            torch.testing.assert_close(tokens.cls, expected[:, 0], atol=1e-5, rtol=1e-5)
    backbone.zero_grad()
    sum(tokens.cls.square().sum() for tokens in out).backward()
    got = vit.blocks[0].attn.proj.weight.grad.clone()
    backbone.zero_grad()
    sum(_dropped(vit, group)[:, 0].square().sum() for group in groups).backward()
    torch.testing.assert_close(got, vit.blocks[0].attn.proj.weight.grad, atol=1e-4, rtol=1e-4)


def _dropped(vit, group):
    """The same, block by block, with every branch run on all crops."""
    x, rope = vit._pos_embed(vit.patch_embed(group.images))
    for index, (block, its) in enumerate(zip(vit.blocks, group.drop.rows, strict=True)):
        own = rope[index] if getattr(vit, "rope_mixed", False) else rope
        keep = [torch.zeros(len(x)).index_fill(0, r, 2.0).view(-1, 1, 1) for r in its]
        attended = block.attn(block.norm1(x), rope=own)
        x = x + keep[0] * (attended if block.gamma_1 is None else block.gamma_1 * attended)
        mixed = block.mlp(block.norm2(x))
        x = x + keep[1] * (mixed if block.gamma_2 is None else block.gamma_2 * mixed)
    return vit.norm(x)


def test_rotary_masks_and_chosen_patches():
    backbone = _build(ROTARY[0]).eval()
    images = torch.randn(2, 3, 64, 64)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :3] = True
    hidden = backbone(images, mask)
    changed = images.clone()
    changed[0, :, :16, :48] = 9.0
    assert torch.equal(backbone(changed, mask).cls, hidden.cls)
    wanted = torch.tensor([0, 2, 20])
    (part,) = backbone.encode([CropGroup(images, mask, None, wanted)])
    torch.testing.assert_close(part.patches, hidden.patches.flatten(0, 1)[wanted])


def test_rotary_compiled_parts_are_equal():
    backbone = _build(ROTARY[0]).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = backbone(images).cls
    backbone.compile_backend = "aot_eager"
    torch.testing.assert_close(backbone(images).cls, expected, atol=1e-6, rtol=1e-5)


def test_a_resnet_gives_its_pooled_feature():
    backbone = _build("resnet18").eval()
    assert type(backbone) is ConvBackbone
    plain = timm.create_model("resnet18", num_classes=0).eval()
    plain.load_state_dict(backbone.encoder_weights())
    for px in (64, 40):
        images = torch.randn(2, 3, px, px)
        tokens = backbone(images)
        assert torch.equal(tokens.cls, plain(images))
        assert tokens.patches.shape == (2, 0, 512)
    facts = backbone_facts("resnet50")
    assert (facts.embed_dim, facts.depth, facts.is_transformer) == (2048, 4, False)


def test_real_sizes_without_memory():
    counts = {}
    for name in ("vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2", "resnet50"):
        with torch.device("meta"):
            made = build_backbone(name, img_px=224)
        counts[name] = round(sum(p.numel() for p in made.model.parameters()) / 1e6, 1)
    assert counts == {
        "vit_small_patch16_dinov3": 21.6,
        "vit_small_patch14_reg4_dinov2": 21.6,
        "resnet50": 23.5,
    }


def test_lora_of_a_giant_trains_little():
    lora = LoRAChoice(rank=8)
    with torch.device("meta"):
        made = build_backbone("vit_giant_patch14_dinov2", img_px=224, lora=lora)
    trained = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    assert trained == 40 * 2 * 2 * 8 * 1536  # blocks, q and v, A and B
    assert sum(p.numel() for p in made.model.parameters()) > 1.1e9


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_lora_is_merged_on_export(name):
    plain = _build(name)
    base = {k: v.clone() for k, v in plain.encoder_weights().items()}
    backbone = _build(name, weights=base, lora=LoRAChoice(rank=2)).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone(images).cls, plain.eval()(images).cls)
    with torch.no_grad():
        for key, parameter in backbone.vit.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    again = _build(name, weights=backbone.encoder_weights()).eval()
    assert set(again.encoder_weights()) == set(base)
    torch.testing.assert_close(again(images).cls, backbone(images).cls, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(again(images).cls, plain(images).cls, atol=1e-3)


def test_positions_and_patches_of_another_size():
    small = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64, **TINY)
    weights = small.state_dict()
    larger = _build("vit_tiny_patch16_224", img_px=128, weights=weights)
    assert larger.vit.pos_embed.shape == (1, 65, 48)
    assert torch.equal(larger.vit.cls_token, small.cls_token)
    finer = build_backbone(
        "vit_tiny_patch16_224", img_px=64, kwargs=TINY | {"patch_size": 8}, weights=weights
    )
    assert finer.vit.pos_embed.shape == (1, 65, 48)
    assert torch.equal(finer.vit.blocks[1].mlp.fc1.weight, small.blocks[1].mlp.fc1.weight)


def test_published_formats(tmp_path):
    backbone = build_backbone(
        "vit_small_patch14_reg4_dinov2", img_px=56, kwargs=TINY | {"init_values": 1e-5}
    )
    own = backbone.encoder_weights()
    renamed = {"reg_token": "register_tokens"}
    meta = {renamed.get(k, k): v for k, v in own.items()} | {"mask_token": torch.zeros(1, 48)}
    meta["pos_embed"] = torch.cat([torch.zeros(1, 1, 48), own["pos_embed"]], dim=1)
    torch.save(meta, tmp_path / "dinov2.pth")
    again = build_backbone(
        "vit_small_patch14_reg4_dinov2",
        img_px=56,
        kwargs=TINY | {"init_values": 1e-5},
        weights=read_start(tmp_path / "dinov2.pth"),
    )
    assert torch.equal(again.vit.reg_token, own["reg_token"])
    assert torch.equal(again.vit.pos_embed, own["pos_embed"])


def test_wrong_weights_and_files(tmp_path):
    small = _build("vit_tiny_patch16_224").encoder_weights()
    save_file(small, tmp_path / "w.safetensors")
    (tmp_path / "as the hub has it").mkdir()
    save_file(small, tmp_path / "as the hub has it" / "model.safetensors")
    assert set(read_start(tmp_path / "as the hub has it")) == set(small)
    with pytest.raises(InputError, match="do not fit 'resnet18'"):
        build_backbone("resnet18", img_px=64, weights=read_start(tmp_path / "w.safetensors"))
    wide = copy.copy(TINY) | {"embed_dim": 32}
    with pytest.raises(InputError, match=r"cls_token is \(1, 1, 48\)"):
        build_backbone("vit_tiny_patch16_224", img_px=64, kwargs=wide, weights=small)
    with pytest.raises(InputError, match="no file of weights"):
        read_start(tmp_path / "nothing.pth")
    torch.save({"a": object}, tmp_path / "code.pth")
    with pytest.raises(InputError, match="more than tensors"):
        read_start(tmp_path / "code.pth")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swin_tiny_patch4_window7_224", "none of the families"),
        ("vit_base_patch16_siglip_224", "class token"),
        ("resnet55", "did you mean resnet5"),
        ("hf-hub:nobody/nothing", "init_from"),
    ],
)
def test_names_that_cannot_be_had(name, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=words):
        backbone_facts(name)
