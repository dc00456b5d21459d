import pytest
import timm
import torch

from cytoray.errors import InputError
from cytoray.models.backbones import backbone_facts, build_backbone, default_drop_path
from cytoray.models.drop_path import DropRows, choose_drop_rows, kept_rows

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def _build(name="vit_tiny_patch16_224", img_px=32, seed=0, **kwargs):
    torch.manual_seed(seed)
    return build_backbone(name, img_px=img_px, kwargs=TINY | kwargs)


def test_tokens_are_timms():
    backbone = _build().eval()
    images = torch.randn(3, 3, 32, 32)
    tokens = backbone(images)
    expected = backbone.vit.forward_features(images)
    assert torch.equal(tokens.cls, expected[:, 0])
    assert torch.equal(tokens.patches, expected[:, 1:])
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY)
    plain.load_state_dict(backbone.vit.state_dict())
    torch.testing.assert_close(plain.eval()(images), tokens.cls)


def test_registers_are_not_patches():
    backbone = _build("vit_small_patch14_reg4_dinov2", img_px=28).eval()
    tokens = backbone(torch.randn(2, 3, 28, 28))
    assert tokens.patches.shape == (2, 4, 32)
    expected = backbone.vit.forward_features(torch.zeros(1, 3, 28, 28))
    assert expected.shape[1] == 1 + 4 + 4
    zero = backbone(torch.zeros(1, 3, 28, 28))
    assert torch.equal(zero.patches, expected[:, 5:])


def test_other_crop_sizes_resample_positions():
    backbone = _build(img_px=64).eval()
    assert backbone(torch.randn(2, 3, 32, 32)).patches.shape == (2, 4, 32)


def test_mask_token_replaces_patch_embedding_before_positions():
    backbone = _build().eval()
    with torch.no_grad():
        backbone.mask_token.normal_()
    images = torch.randn(2, 3, 32, 32)
    mask = torch.tensor([[True, False, False, True], [False] * 4])
    masked = backbone(images, mask)
    changed = images.clone()
    changed[0, :, :16, :16] = 5.0  # under the mask: must not matter
    assert torch.equal(backbone(changed, mask).cls, masked.cls)
    plain = backbone(images)
    assert torch.equal(plain.cls[1], masked.cls[1])
    assert not torch.allclose(plain.cls[0], masked.cls[0])

    vit = backbone.vit
    x = vit.patch_embed(images).flatten(1, 2)
    for crop, patch in mask.nonzero().tolist():
        x[crop, patch] = backbone.mask_token
    x = torch.cat([vit.cls_token.expand(2, -1, -1), x], 1) + vit.pos_embed
    expected = vit.norm(vit.blocks(x))
    torch.testing.assert_close(masked.patches, expected[:, 1:])


def test_drop_path_is_a_scaled_subset_per_branch():
    backbone = _build(init_values=0.5)
    images = torch.randn(4, 3, 32, 32)
    rows = [(torch.tensor([0, 2]), torch.tensor([1, 2])), (torch.tensor([3]), torch.tensor([0]))]
    out = backbone(images, None, DropRows(rows, 2.0))
    vit = backbone.vit
    x = vit._pos_embed(vit.patch_embed(images))
    for block, (attn_rows, mlp_rows) in zip(vit.blocks, rows, strict=True):
        keep = torch.zeros(4).index_fill(0, attn_rows, 2.0).view(4, 1, 1)
        x = x + keep * block.ls1(block.attn(block.norm1(x)))
        keep = torch.zeros(4).index_fill(0, mlp_rows, 2.0).view(4, 1, 1)
        x = x + keep * block.ls2(block.mlp(block.norm2(x)))
    torch.testing.assert_close(out.patches, vit.norm(x)[:, 1:])


def test_drop_path_may_leave_a_rank_without_rows():
    backbone = _build()
    none = torch.zeros(0, dtype=torch.long)
    tokens = backbone(torch.randn(2, 3, 32, 32), None, DropRows([(none, none)] * 2, 2.0))
    tokens.cls.sum().backward()
    assert all(p.grad is not None for n, p in backbone.named_parameters() if n != "mask_token")


def test_kept_rows_are_shared_out_over_ranks():
    kept = kept_rows(3, 7, group=0, branches=4, total=20, rate=0.3)
    assert kept.shape == (4, 14)
    assert all(len(set(row)) == 14 for row in kept.tolist())
    assert len({tuple(row) for row in kept.tolist()}) == 4  # a permutation of its own per branch
    common = {"group": 0, "depth": 2, "total": 20, "rate": 0.3}
    parts = [choose_drop_rows(3, 7, start=a, stop=b, **common) for a, b in ((0, 6), (6, 20))]
    assert parts[0] is not None
    assert parts[1] is not None
    assert parts[0].scale == 20 / 14
    joined = [*parts[0].rows[2], *(parts[1].rows[2] + 6)]
    assert joined == kept[2].tolist()
    on_device = parts[0].to(torch.device("cpu"))
    assert on_device.rows[1][0].tolist() == parts[0].rows[2].tolist()
    other = kept_rows(3, 8, group=0, branches=4, total=20, rate=0.3)
    assert other.tolist() != kept.tolist()
    assert choose_drop_rows(3, 7, start=0, stop=20, **common | {"rate": 0.0}) is None


def test_checkpointed_blocks_give_the_same_gradient():
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        backbone = _build()
        backbone.checkpoint_blocks = recompute
        backbone(images).cls.square().sum().backward()
        gradients.append(backbone.vit.blocks[0].attn.qkv.weight.grad)
    assert torch.equal(*gradients)


def test_facts_need_no_weights():
    facts = backbone_facts("vit_large_patch16_224")
    assert (facts.patch_px, facts.embed_dim, facts.depth) == (16, 1024, 24)
    assert [default_drop_path(d) for d in (192, 768, 1024)] == [0.0, 0.1, 0.3]


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("vit_tinny_patch16_224", {}, "did you mean vit_tiny_patch16_224"),
        ("swin_tiny_patch4_window7_224", {}, "cannot build|none of the families"),
        ("vit_base_patch16_siglip_224", {}, "class token|cannot build"),
        ("vit_tiny_patch16_224", {"widht": 3}, "widht"),
    ],
)
def test_wrong_names_say_how_to_mend_them(name, kwargs, words):
    with pytest.raises(InputError, match=words):
        backbone_facts(name, tuple(kwargs.items()))


def test_weights_that_do_not_fit():
    with pytest.raises(InputError, match="do not fit"):
        build_backbone("vit_tiny_patch16_224", img_px=32, weights={}, kwargs=TINY)
