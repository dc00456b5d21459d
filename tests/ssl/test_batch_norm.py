import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cytoray.ssl.batch_norm import GlobalBatchNorm, batch_norm, projection_mlp


def test_is_torchs_batch_norm():
    torch.manual_seed(0)
    x = (torch.randn(9, 5) * 3 + 100).requires_grad_()
    weight = torch.randn(9, 5)
    expected = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(batch_norm(x), expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad((expected * weight).sum(), x)[0]
    got = torch.autograd.grad((batch_norm(x) * weight).sum(), x)[0]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    double = torch.randn(4, 3, dtype=torch.float64).float().requires_grad_()
    assert batch_norm(double).mean(0).abs().max() < 1e-6


def test_module_has_scale_and_shift_and_no_running_state():
    norm = GlobalBatchNorm(5)
    x = torch.randn(7, 5)
    with torch.no_grad():
        norm.weight.fill_(2.0)
        norm.bias.fill_(3.0)
    torch.testing.assert_close(norm(x), 2 * batch_norm(x) + 3)
    assert torch.equal(norm.eval()(x), norm.train()(x))
    assert set(norm.state_dict()) == {"weight", "bias"}
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert not GlobalBatchNorm(5, affine=False).state_dict()


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, "linear0 norm0 relu0 linear1"),
        ({"last_norm": True}, "linear0 norm0 relu0 linear1 norm1"),
        ({"norm": False}, "linear0 relu0 linear1"),
    ],
)
def test_layers_of_a_projection_mlp(options, kinds):
    mlp = projection_mlp([4, 6, 3], **options)
    assert [name for name, _ in mlp.named_children()] == kinds.split()
    linears = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    assert {layer.bias is None for layer in linears} == {options.get("norm", True)}
    out = mlp(torch.randn(8, 4))
    assert out.shape == (8, 3)
    if "last_norm" in options:
        torch.testing.assert_close(out.var(0, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)
        assert "norm1.weight" not in mlp.state_dict()
