import pytest
import torch

from cytoray.mil.packing import pack

SIZES = (1, 7, 300)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def bags():
    """Bags of 1, 7 and 300 instances, 24 wide."""
    return [torch.randn(size, 24) for size in SIZES]


def check_parity(aggregator, bags, reference, *, atol=1e-5):
    """Packed, alone, and a plain per-bag reference agree: logits, attention and gradients.

    `reference` maps (aggregator, bag (N, D)) to (logits (C,) of all tasks, attention (N,) or None).
    """
    parameters = list(aggregator.parameters())

    def gradients(logits):
        weights = torch.arange(1.0, 1.0 + logits.numel()).reshape(logits.shape)
        parts = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters, strict=True)
        ]

    packed = aggregator(*pack(bags))
    alone = [aggregator(*pack([bag])) for bag in bags]
    plain = [reference(aggregator, bag) for bag in bags]
    by_loop = torch.stack([logits for logits, _ in plain])
    all_tasks = torch.cat(packed.task_logits, dim=1)
    one_by_one = torch.cat([torch.cat(output.task_logits, dim=1) for output in alone])
    assert torch.allclose(all_tasks, by_loop, atol=atol)
    assert torch.allclose(all_tasks, one_by_one, atol=atol)
    assert torch.equal(packed.logits, packed.task_logits[0])
    attention = torch.cat([output.attention for output in alone])
    assert torch.allclose(packed.attention, attention, atol=atol)
    if plain[0][1] is not None:
        assert torch.allclose(packed.attention, torch.cat([a for _, a in plain]), atol=atol)
    assert not packed.attention.requires_grad
    assert bool((packed.attention >= 0).all())
    for part in packed.attention.split([len(bag) for bag in bags]):
        assert float(part.sum()) == pytest.approx(1.0, abs=1e-5)
    expected = gradients(by_loop)
    scale = max(1.0, max(float(g.abs().max()) for g in expected))
    for mine in (gradients(all_tasks), gradients(one_by_one)):
        for a, b in zip(mine, expected, strict=True):
            assert torch.allclose(a, b, atol=atol * scale)
