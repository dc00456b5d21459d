"""Positions by a matrix product are those of timm, and ask no kernel that is not repeatable."""

import pytest
import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cytoray.models import position_table
from cytoray.models.position_table import add_positions, add_rotary_positions, resample_positions


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resampled_table_and_gradient_are_timms(num_prefix, dtype):
    old, new = (7, 6), (3, 9)
    torch.manual_seed(0)
    tables = [torch.randn(1, num_prefix + 42, 8, dtype=dtype, requires_grad=True)]
    tables.append(tables[0].detach().clone().requires_grad_())
    expected = resample_abs_pos_embed(tables[0], new, old, num_prefix)
    got = resample_positions(tables[1], old, new, num_prefix)
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(got, expected, **tolerance)
    weight = torch.randn_like(got)
    for made in (expected, got):
        (made * weight).sum().backward()
    torch.testing.assert_close(tables[1].grad, tables[0].grad, **tolerance)
    assert resample_positions(tables[1], old, old, num_prefix) is tables[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"no_embed_class": True, "reg_tokens": 2}),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("eva02_tiny_patch14_224", {}),
        ("eva02_tiny_patch14_224", {"no_embed_class": True, "num_reg_tokens": 2}),
        ("eva02_tiny_patch14_224", {"use_rot_pos_emb": False}),
        ("vit_small_patch16_dinov3", {}),
    ],
)
def test_tokens_are_timms(name, options):
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, depth=1, **options)
    for side in (vit.patch_embed.grid_size[0], 3):
        x = torch.randn(2, side, side, vit.embed_dim)
        # The second gives a rotary embedding as well.
        add = add_rotary_positions if isinstance(vit, Eva) else add_positions
        torch.testing.assert_close(add(vit, x), vit._pos_embed(x), atol=1e-6, rtol=1e-5)


def test_weights_are_real_whoever_asks_first():
    table = torch.randn(1, 26, 4)
    position_table._weights.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert resample_positions(mode.from_tensor(table), (5, 5), (2, 3), 1).shape == (1, 7, 4)
    assert resample_positions(table.to("meta"), (5, 5), (2, 3), 1).shape == (1, 7, 4)
    got = resample_positions(table, (5, 5), (2, 3), 1)
    torch.testing.assert_close(got, resample_abs_pos_embed(table, (2, 3), (5, 5), 1))


class _Interpolations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "upsample" in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_interpolated_in_training():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, depth=1)
    x = torch.randn(2, 6, 6, vit.embed_dim)
    add_positions(vit, x)  # makes the weights
    with _Interpolations() as watch:
        add_positions(vit, x).sum().backward()
        assert watch.seen == []
        vit._pos_embed(x).sum().backward()
    assert any("backward" in name for name in watch.seen)
