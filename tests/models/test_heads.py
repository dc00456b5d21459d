import pytest
import torch
import torch.nn.functional as F

from cytoray.models.heads import DINOHead, PrototypeLayer, _UnitRows
from cytoray.ssl.losses import soft_cross_entropy


def _reference(head: DINOHead, x: torch.Tensor) -> torch.Tensor:
    for index in (0, 2, 4):
        linear = head.mlp[index]
        x = x @ linear.weight.T + linear.bias
        if index < 4:
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    x = x / x.norm(dim=1, keepdim=True)
    w = head.last_layer.weight
    return x @ (w / w.norm(dim=1, keepdim=True)).T


def test_head_is_mlp_then_cosine_to_prototypes():
    torch.manual_seed(0)
    head = DINOHead(12, 40, hidden_dim=20, bottleneck_dim=8)
    x = torch.randn(6, 12)
    torch.testing.assert_close(head(x), _reference(head, x), atol=1e-6, rtol=1e-5)
    assert head(x).abs().max() <= 1 + 1e-6
    assert [layer.out_features for layer in head.mlp if hasattr(layer, "out_features")] == [
        20,
        20,
        8,
    ]


def test_prototype_gain_is_fixed():
    layer = PrototypeLayer(8, 5)
    x = F.normalize(torch.randn(3, 8), dim=-1)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(7.0)
    torch.testing.assert_close(layer(x), before)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    along = (layer.weight.grad * layer.weight).sum(-1)  # no gradient along a prototype's length
    torch.testing.assert_close(along, torch.zeros(5), atol=1e-5, rtol=0)


def test_no_rows_still_reach_every_parameter():
    head = DINOHead(12, 40, hidden_dim=20, bottleneck_dim=8)
    out = head(torch.zeros(0, 12))
    assert out.shape == (0, 40)
    out.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_number_of_layers():
    assert len(DINOHead(4, 5, num_layers=1, bottleneck_dim=3).mlp) == 1


def test_parts_have_the_logits_and_gradients_of_the_whole():
    torch.manual_seed(0)
    head = DINOHead(12, 20, hidden_dim=16, bottleneck_dim=8)
    parts = [torch.randn(n, 12) for n in (3, 0, 5)]
    logits = head.forward_parts(parts)
    assert [len(part) for part in logits] == [3, 0, 5]
    whole = head(torch.cat(parts))
    torch.testing.assert_close(torch.cat(logits), whole)
    seeds = torch.randn_like(whole)
    got = torch.autograd.grad((torch.cat(logits) * seeds).sum(), list(head.parameters()))
    wanted = torch.autograd.grad((whole * seeds).sum(), list(head.parameters()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overwrite", [(True, True), (True, False)])
def test_parts_may_keep_their_gradients_in_their_own_memory(overwrite):
    torch.manual_seed(0)
    head = DINOHead(12, 20, hidden_dim=16, bottleneck_dim=8)
    parts = [torch.randn(n, 12) for n in (3, 5)]
    targets = [torch.softmax(torch.randn(len(part), 1, 20), -1) for part in parts]

    def gradients(logits, in_place):
        loss = sum(
            soft_cross_entropy(x.unsqueeze(1), t, torch.ones(len(x)), temp=0.1, overwrite=o)
            for x, t, o in zip(logits, targets, in_place, strict=True)
        )
        return torch.autograd.grad(3.0 * loss, list(head.parameters()))

    got = gradients(head.forward_parts(parts), overwrite)
    wanted = gradients(head.forward_parts(parts), (False, False))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_unit_rows_differentiate_as_normalize():
    layer = PrototypeLayer(8, 5)
    assert torch.autograd.gradcheck(lambda w: _UnitRows.apply(w), layer.weight.double())
    seeds = torch.randn(5, 8)
    (got,) = torch.autograd.grad((layer.unit_rows() * seeds).sum(), layer.weight)
    unit = torch.nn.functional.normalize(layer.weight, dim=-1)
    (wanted,) = torch.autograd.grad((unit * seeds).sum(), layer.weight)
    torch.testing.assert_close(got, wanted)
