import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cytoray.models.linear import (
    Linear,
    PatchProjection,
    linear,
    use_cpu_products,
    use_patch_products,
)


def relative(mine, reference):
    return float((mine - reference).detach().abs().max() / reference.detach().abs().max())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 24, 8), (300, 24, 1), (777, 130, 70)])
def test_linear_is_the_product_and_its_gradients(rows, width, out, bias, relu):
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, width), (out, width), *([(out,)] if bias else [])]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    weights = torch.randn(rows, out, generator=generator)
    mine = [value.clone().requires_grad_() for value in values]
    exact = [value.double().requires_grad_() for value in values]
    answer = linear(*mine, relu=relu)
    x, weight, *rest = exact
    expected = torch.einsum("td,hd->th", x, weight) + sum(rest)
    expected = expected.clamp(min=0) if relu else expected
    assert answer.shape == (rows, out)
    assert relative(answer, expected) < 1e-6
    (answer * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for a, b in zip(mine, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert relative(a.grad, b.grad) < 2e-6


def test_linear_takes_any_layout_and_repeats_itself():
    x, weight = torch.randn(130, 777), torch.randn(2 * 70, 130)[::2]
    first = linear(x.T, weight)
    assert relative(first, x.T.double() @ weight.T.double()) < 1e-6
    assert torch.equal(first, linear(x.T.contiguous(), weight.contiguous()))
    assert torch.equal(first, linear(x.T, weight))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="oneDNN is for AVX-512"
)
@pytest.mark.parametrize("threads", [1, 2])
def test_large_products_and_their_gradients_are_onednn_s(threads):
    before = torch.get_num_threads()
    x, weight = torch.randn(777, 130, requires_grad=True), torch.randn(70, 130, requires_grad=True)
    torch.set_num_threads(threads)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            linear(x, weight, relu=True).sum().backward()
    finally:
        torch.set_num_threads(before)
    called = {event.key for event in profile.key_averages()}
    assert {"aten::mkldnn_convolution", "aten::convolution_backward"} <= called
    assert not called & {"aten::addmm", "aten::mm", "aten::_slow_conv2d_forward"}


def test_linear_follows_the_precision_it_is_given():
    x, weight = torch.randn(777, 130), torch.randn(70, 130)
    wide = linear(x.double(), weight.double(), relu=True)
    assert torch.equal(wide, F.linear(x.double(), weight.double()).relu())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        assert linear(x, weight).dtype == torch.bfloat16


def test_the_layer_has_the_state_and_the_start_of_torch_s():
    torch.manual_seed(1)
    own = Linear(130, 70, relu=True)
    torch.manual_seed(1)
    plain = nn.Linear(130, 70)
    plain.load_state_dict(own.state_dict())
    x = torch.randn(777, 130)
    assert torch.allclose(own(x), plain(x).relu(), atol=1e-5)


def test_a_model_keeps_its_names_and_answers() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(96, 192), nn.GELU(), nn.Sequential(nn.Linear(192, 40)))
    x = torch.randn(4, 100, 96)
    want, names = plain(x), list(plain.state_dict())
    use_cpu_products(plain)
    assert [type(m) for m in plain.modules() if isinstance(m, nn.Linear)] == [Linear, Linear]
    got = plain(x)
    assert got.shape == want.shape
    assert torch.allclose(got, want, atol=1e-5)
    assert list(plain.state_dict()) == names
    assert torch.allclose(plain(x[0, 0]), want[0, 0], atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 50)])
def test_a_patch_projection_is_the_convolution(height, width, autocast):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 20, 16, stride=16)
    product = nn.Sequential(copy.deepcopy(plain))
    use_patch_products(product)
    assert type(product[0]) is PatchProjection
    images = [torch.randn(2, 3, height, width, requires_grad=True)]
    images.append(images[0].detach().clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want, got = plain(images[0]), product(images[1])
    assert got.shape == want.shape == (2, 20, height // 16, width // 16)
    assert got.dtype == want.dtype
    limit = 2e-2 if autocast else 1e-5
    assert relative(got, want) < limit
    for out in (want, got):
        out.float().square().sum().backward()
    for mine, reference in zip(
        (images[1], *product.parameters()), (images[0], *plain.parameters()), strict=True
    ):
        assert mine.grad is not None
        assert relative(mine.grad, reference.grad) < limit


def test_only_convolutions_that_cut_patches_become_products():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=4),
        nn.Conv2d(3, 4, 4, stride=2),
        nn.Conv2d(3, 4, 4, stride=4, padding=1),
        nn.Conv2d(4, 4, 4, stride=4, groups=2),
        nn.Conv2d(3, 4, 1),
    )
    use_patch_products(model)
    assert [type(m) for m in model] == [PatchProjection, *[nn.Conv2d] * 4]
