"""Crops of two sizes in one pass, and compiled blocks, give what each size alone gives."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cytoray.models import block_pass
from cytoray.models.backbones import CropGroup, Tokens, build_backbone
from cytoray.models.drop_path import DropRows, choose_drop_rows
from cytoray.models.sr_transformer import SRConfig

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}
BACKBONES = {
    "plain": {},
    "registers, LayerScale": {
        "name": "vit_small_patch14_reg4_dinov2",
        "kwargs": TINY | {"init_values": 0.5, "qk_norm": True},
    },
    "sparse": {"sr": SRConfig(sparse=True, irpe=True, top_h=3)},
    "no fixed block": {"kwargs": TINY | {"block_fn": None}},
}


def _backbone(name: str = "plain"):
    torch.manual_seed(0)
    options = {"name": "vit_tiny_patch16_224", "kwargs": TINY} | BACKBONES[name]
    px = 56 if "14" in options["name"] else 64
    if name == "no fixed block":
        from timm.models.vision_transformer import ParallelScalingBlock

        options["kwargs"] = TINY | {"block_fn": ParallelScalingBlock}
    backbone = build_backbone(**options, img_px=px)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone, px


def _groups(px: int, *, rate: float = 0.0) -> list[CropGroup]:
    generator = torch.Generator().manual_seed(1)
    big = torch.randn(4, 3, px, px, generator=generator)
    small = torch.randn(6, 3, px // 2, px // 2, generator=generator)
    mask = torch.rand(4, 16, generator=generator) < 0.3
    rows = [
        choose_drop_rows(0, 0, group=g, depth=2, total=n, start=0, stop=n, rate=rate)
        for g, n in enumerate((4, 6))
    ]
    drop = [None if kept is None else kept.to(torch.device("cpu")) for kept in rows]
    nothing = torch.empty(0, dtype=torch.int64)
    return [
        CropGroup(big, mask, drop[0], mask.flatten().nonzero().squeeze(1)),
        CropGroup(small, None, drop[1], nothing),
    ]


def _tokens_and_gradients(backbone, groups) -> tuple[list[Tokens], dict[str, torch.Tensor]]:
    backbone.zero_grad()
    found = backbone.encode(groups)
    generator = torch.Generator().manual_seed(2)
    outs = torch.cat([part for tokens in found for part in (tokens.cls, tokens.patches)])
    (outs * torch.randn(outs.shape, generator=generator)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
    return found, gradients


def _assert_alike(got, expected) -> None:
    for one, other in zip(got[0], expected[0], strict=True):
        torch.testing.assert_close(one.cls, other.cls, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.patches, other.patches, atol=1e-5, rtol=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().clamp_min(1.0)
        difference = (got[1][name] - gradient).abs().max()
        assert difference / scale < 1e-5, name


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("name", BACKBONES)
def test_packed_crops_are_the_crops_alone(name, rate):
    if rate and name == "no fixed block":
        pytest.skip("its two branches are one; drop path needs a block of two")
    backbone, px = _backbone(name)
    groups = _groups(px, rate=rate)
    expected = _tokens_and_gradients(backbone, groups)
    backbone.pack = True
    _assert_alike(_tokens_and_gradients(backbone, groups), expected)
    backbone.checkpoint_blocks = True
    _assert_alike(_tokens_and_gradients(backbone, groups), expected)


@pytest.mark.parametrize("pack", [False, True])
def test_asking_for_some_patches_does_not_change_them(pack):
    backbone, px = _backbone("registers, LayerScale")
    backbone.pack = pack
    groups = _groups(px)
    some = backbone.encode(groups)
    every = backbone.encode([CropGroup(group.images, group.mask) for group in groups])
    for group, few, all_of_them in zip(groups, some, every, strict=True):
        torch.testing.assert_close(few.cls, all_of_them.cls, atol=1e-6, rtol=1e-6)
        assert group.patches is not None
        named = all_of_them.patches.flatten(0, 1).index_select(0, group.patches)
        torch.testing.assert_close(few.patches, named, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["plain", "sparse"])
@pytest.mark.parametrize("pack", [False, True])
def test_compiled_blocks_are_the_blocks(name, pack):
    backbone, px = _backbone(name)
    backbone.pack = pack
    for rate in (0.0, 0.4):
        groups = _groups(px, rate=rate)
        expected = _tokens_and_gradients(backbone, groups)
        for recompute in (False, True):
            backbone.checkpoint_blocks = recompute
            backbone.compile_backend = "aot_eager"
            _assert_alike(_tokens_and_gradients(backbone, groups), expected)
            backbone.compile_backend, backbone.checkpoint_blocks = None, False
    assert not any("_orig_mod" in key for key in backbone.state_dict())


@pytest.mark.parametrize(
    ("name", "pack", "dropping"),
    [
        ("plain", False, False),
        ("plain", True, True),
        ("sparse", True, False),
        ("sparse", False, True),
    ],
)
def test_no_block_or_step_is_compiled_anew(monkeypatch, name, pack, dropping):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    made = torch.compile(block_pass._residual, backend=counter, dynamic=dropping)
    monkeypatch.setattr(block_pass, "compiled", lambda function, backend, dynamic: made)
    torch.manual_seed(0)
    options = {"name": "vit_tiny_patch16_224"} | BACKBONES[name]
    backbone = build_backbone(**options, img_px=64, kwargs=TINY | {"depth": 4})
    backbone.compile_backend, backbone.pack = "counted", pack
    images = [torch.randn(8, 3, 64, 64), torch.randn(12, 3, 32, 32)]
    counts = []
    for step in range(8):  # at each step another number of rows is kept, and of patches asked for
        rows = torch.arange(4 + step % 3)
        drop = DropRows([(rows, rows[1:])] * 4, 1.5) if dropping else None
        asked = [torch.arange(9 + step), torch.empty(0, dtype=torch.int64)]
        groups = [CropGroup(x, drop=drop, patches=p) for x, p in zip(images, asked, strict=True)]
        sum(tokens.cls.sum() for tokens in backbone.encode(groups)).backward()
        counts.append(counter.frame_count)
    assert counts[2] == counts[-1]
    if not dropping:  # code of each crop size or of all, and the same for patches asked for
        assert counts[-1] == (2 if pack else 4)


def test_attention_in_its_parts_is_the_fused_one_to_the_precision_of_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(3, 2, 17, 8, generator=generator, requires_grad=True) for _ in range(3)]
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    want = torch.nn.functional.scaled_dot_product_attention(*exact)
    got = block_pass._weighted_values(*low, 0.0)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0.03)
    want.square().sum().backward()
    got.float().square().sum().backward()
    for a, b in zip(low, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad.float(), b.grad, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["plain", "registers, LayerScale", "no fixed block"])
def test_tokens_between_blocks_are_of_the_type_of_the_products(monkeypatch, name) -> None:
    backbone, px = _backbone(name)
    images = torch.randn(3, 3, px, px)
    exact = backbone(images)
    seen = []
    run = block_pass.residual

    def noted(block, x, *args):
        out = run(block, x, *args)
        seen.append((x.dtype, out.dtype))
        return out

    for block in backbone.vit.blocks:
        monkeypatch.setattr(block, "residual", lambda *args, b=block: noted(b, *args))
    with torch.autocast("cpu", torch.bfloat16):
        low = backbone(images)
    kinds = {kind for pair in seen for kind in pair}
    if name != "no fixed block":  # that one adds its branches itself
        assert kinds == {torch.bfloat16}
    assert seen[0][0] == torch.bfloat16
    assert (low.cls.float() - exact.cls).norm() < 0.05 * exact.cls.norm()
