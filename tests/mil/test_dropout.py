import math

import pytest
import torch

from cytoray.mil.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_dropout_leaves_out_its_share_and_scales_the_rest(share, dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 331, dtype=dtype, requires_grad=True)
    out = Dropout(share)(x)
    kept = out != 0
    count = x.numel()
    spread = math.sqrt(count * share * (1 - share))
    assert abs(float(kept.sum()) - count * (1 - share)) < 5 * spread
    scale = torch.tensor(1 / (1 - share)).to(dtype)
    assert torch.allclose(out[kept], scale, rtol=1e-4 if dtype != torch.bfloat16 else 1e-2)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_dropout_draws_every_element_by_itself():
    """Neighbours share a random word: they agree as often as independent draws do."""
    torch.manual_seed(0)
    kept = Dropout(0.25)(torch.ones(400_000)) != 0
    expected = 0.75**2 + 0.25**2
    for apart in (1, 2, 3, 4, 5):
        agree = (kept[apart:] == kept[:-apart]).double().mean()
        assert abs(float(agree) - expected) < 5 * math.sqrt(expected * (1 - expected) / 4e5)


def test_dropout_follows_the_seed_and_rests_in_evaluation():
    layer, x = Dropout(0.5), torch.randn(50, 7)
    torch.manual_seed(3)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()
    assert torch.equal(layer.eval()(x), x)
