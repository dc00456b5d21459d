import math

import pytest
import torch
import torch.nn.functional as F

from cytoray.errors import InputError
from cytoray.mil.nystrom import IterativePinv, NystromAttention
from cytoray.mil.transmil import TransMIL

from .conftest import check_parity

OPTIONS = {"hidden_dim": 32, "heads": 4, "num_landmarks": 16, "dropout": 0.0}


def plain_nystrom(layer, x, scale_over):
    """Batched over heads in one (1, H, N, E) tensor, landmarks by explicit sums."""
    n, dim = x.shape
    m, heads = layer.num_landmarks, layer.heads
    padding = (m - n % m) % m
    x = torch.cat([x.new_zeros(padding, dim), x])
    q, k, v = (
        p.reshape(len(x), heads, dim // heads).permute(1, 0, 2)[None]
        for p in F.linear(x, layer.to_qkv.weight).chunk(3, dim=1)
    )
    q = q * (dim // heads) ** -0.5
    group = math.ceil(n / m)
    q_land = torch.stack([q[:, :, i * group : (i + 1) * group].sum(2) / group for i in range(m)], 2)
    k_land = torch.stack([k[:, :, i * group : (i + 1) * group].sum(2) / group for i in range(m)], 2)
    a1 = torch.softmax(q @ k_land.transpose(-1, -2), -1)
    a2 = torch.softmax(q_land @ k_land.transpose(-1, -2), -1)
    a3 = torch.softmax(q_land @ k.transpose(-1, -2), -1)
    col, row = a2.abs().sum(-1), a2.abs().sum(-2)
    if scale_over == "all":
        z = a2.transpose(-1, -2) / (col.max() * row.max())
    else:
        z = torch.stack([a.T / (a.abs().sum(-1).max() * a.abs().sum(-2).max()) for a in a2[0]])[
            None
        ]
    eye = torch.eye(m)
    for _ in range(6):
        az = a2 @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    out = (a1 @ z) @ (a3 @ v)
    out = out + F.conv2d(v, layer.values_conv.weight, padding=(16, 0), groups=heads)
    out = out[0].permute(1, 0, 2).reshape(len(x), dim)
    return F.linear(out, layer.to_out.weight, layer.to_out.bias)[padding:]


def plain_transmil(scale_over):
    def reference(aggregator, bag):
        h = F.relu(aggregator.embed[0](bag))
        side = math.ceil(math.sqrt(len(h)))
        x = torch.cat([aggregator.class_token, h, h[: side * side - len(h)]])
        x = x + plain_nystrom(aggregator.layers[0], aggregator.norms[0](x), scale_over)
        square = x[1:].transpose(0, 1).reshape(1, -1, side, side)
        encoded = square
        for conv in aggregator.position.convolutions:
            size = conv.weight.shape[-1]
            encoded = encoded + F.conv2d(
                square, conv.weight, conv.bias, padding=size // 2, groups=square.shape[1]
            )
        x = torch.cat([x[:1], encoded.flatten(2)[0].transpose(0, 1)])
        x = x + plain_nystrom(aggregator.layers[1], aggregator.norms[1](x), scale_over)
        return aggregator.classifier(aggregator.norm(x)[0]), None

    return reference


@pytest.mark.parametrize("reference", [False, True])
def test_equals_a_plain_version(reference, bags):
    aggregator = TransMIL(24, 3, reference=reference, **OPTIONS)
    check_parity(aggregator, bags, plain_transmil("all" if reference else "head"))


def test_pseudo_inverse_inverts():
    matrix = (5 * torch.eye(12) + torch.randn(3, 12, 12)).softmax(-1).double()
    inverse, expected = IterativePinv(matrix, 20), torch.linalg.pinv(matrix)
    thin = torch.randn(3, 12, 2).double()
    assert torch.allclose(inverse.times(torch.eye(12).double().expand(3, 12, 12)), expected)
    assert torch.allclose(inverse.times(thin), expected @ thin)
    assert torch.allclose(inverse.times_rows(thin.mT), thin.mT @ expected)


def test_as_many_landmarks_as_tokens_is_plain_attention():
    """With every token its own landmark the approximation is exact (no convolution, no padding)."""
    layer = NystromAttention(32, heads=4, num_landmarks=16, pinv_iterations=30, dropout=0.0)
    torch.nn.init.zeros_(layer.values_conv.weight)
    layer, x = layer.double(), torch.randn(16, 32).double()
    q, k, v = (p.reshape(16, 4, 8).transpose(0, 1) for p in layer.to_qkv(x).chunk(3, 1))
    attention = (q @ k.mT / math.sqrt(8)).softmax(-1)
    out, row = layer(x, attention_of=3)
    expected = layer.to_out((attention @ v).transpose(0, 1).reshape(16, 32))
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(row, attention[:, 3].mean(0), atol=1e-5)


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="multiple of heads"):
        TransMIL(24, 2, hidden_dim=30, heads=4)


@pytest.mark.parametrize("size", [2, 15, 16, 17, 31, 33, 250])
def test_padding_kept_in_mind_equals_padding_laid_out(size):
    """Every split of padding: none, less than a landmark, many landmarks, a mixed one."""
    layer, x = NystromAttention(32, heads=4, num_landmarks=16, dropout=0.0), torch.randn(size, 32)
    layer, x = layer.double(), x.double().requires_grad_()
    out, row = layer(x, attention_of=1)
    expected = plain_nystrom(layer, x, "head")
    assert torch.allclose(out, expected, atol=1e-9)
    weights = torch.randn_like(out)
    mine, theirs = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (out, expected))
    assert torch.allclose(mine, theirs, atol=1e-8)
    assert row.shape == (size,)
