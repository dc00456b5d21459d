from __future__ import annotations

import pytest
import torch

from cytoray.ssl.losses import cross_entropy
from cytoray.ssl.losses import soft_cross_entropy as fused
from cytoray.ssl.losses.lazy_targets import LazyTargets

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def plain(logits, targets, weights, temp, mass):
    """The definition, in double precision."""
    logs = torch.log_softmax(logits.double() / temp, dim=-1)
    per_group = -(targets.double() * logs).sum((1, 2))
    return (per_group * weights.double()).sum()


def make(n, v, shared, k=11, mass=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n + 10 * v)
    logits = torch.randn(n, v, k, generator=generator).to(dtype).requires_grad_(True)
    targets = torch.rand(n, 1 if shared else v, k, generator=generator)
    targets = mass * targets / targets.sum(-1, keepdim=True)
    return logits, targets, torch.rand(n, generator=generator)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 20])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("n", "v", "mass"), [(1, 1, 1.0), (5, 3, 2.0), (7, 8, 1.0)])
def test_loss_and_gradient_are_those_of_the_definition(
    n, v, mass, shared, block_bytes, overwrite, monkeypatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_CPU_BLOCK_BYTES", block_bytes)
    logits, targets, weights = make(n, v, shared, mass=mass)
    expected = plain(logits, targets.expand(n, v, -1), weights, 0.1, mass)
    (wanted,) = torch.autograd.grad(3.0 * expected, logits)
    before = logits.detach().clone()
    loss = fused(logits, targets, weights, temp=0.1, mass=mass, overwrite=overwrite)
    (3.0 * loss).backward()
    got = logits.grad
    assert torch.equal(logits.detach(), before) != overwrite
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_compiled_loss_is_the_definition(overwrite, backend) -> None:
    for n, v, shared, mass in ((1, 1, False, 1.0), (5, 3, True, 2.0), (7, 3, True, 2.0)):
        logits, targets, weights = make(n, v, shared, mass=mass)
        expected = plain(logits, targets.expand(n, v, -1), weights, 0.1, mass)
        (wanted,) = torch.autograd.grad(3.0 * expected, logits)
        with torch.no_grad():
            alone = fused(logits, targets, weights, temp=0.1, mass=mass, compile_backend=backend)
        before = logits.detach().clone()
        loss = fused(
            logits,
            targets,
            weights,
            temp=0.1,
            mass=mass,
            overwrite=overwrite,
            compile_backend=backend,
        )
        (3.0 * loss).backward()
        assert torch.equal(logits.detach(), before) != overwrite
        for found in (alone, loss):
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logits.grad, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("overwrite", [False, True])
def test_targets_that_are_not_written_out_are_the_same(overwrite, backend) -> None:
    logits, _, weights = make(6, 1, False)
    generator = torch.Generator().manual_seed(1)
    teacher, centre = torch.rand(7, logits.shape[-1], generator=generator).sub(0.5).split([6, 1])
    sharp = torch.tensor(1 / 0.05)
    row = -((teacher - centre) * sharp).logsumexp(-1)
    lazy = LazyTargets(teacher, -centre[0] * sharp, row, sharp)
    targets = ((teacher - centre) * sharp).softmax(-1).unsqueeze(1)
    torch.testing.assert_close(lazy.written().unsqueeze(1), targets)
    expected = plain(logits, targets, weights, 0.1, 1.0)
    (wanted,) = torch.autograd.grad(3.0 * expected, logits)
    loss = fused(logits, lazy, weights, temp=0.1, overwrite=overwrite, compile_backend=backend)
    (3.0 * loss).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-5, atol=5e-5)  # slopes up to 30


def test_compiled_loss_of_nothing_is_zero() -> None:
    logits, targets, weights = make(0, 1, False)
    loss = fused(logits, targets, weights, temp=0.1, compile_backend="aot_eager")
    loss.backward()
    assert float(loss) == 0.0


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("overwrite", [False, True])
def test_half_precision_logits_get_gradients_of_their_own_kind(overwrite, backend) -> None:
    logits, targets, weights = make(4, 2, True, dtype=torch.bfloat16)
    exact = logits.detach().double().requires_grad_(True)
    options = {"overwrite": overwrite, "compile_backend": backend}
    fused(logits, targets, weights, temp=0.1, **options).backward()
    plain(exact, targets.expand(4, 2, -1), weights, 0.1, 1.0).backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-2, atol=1e-3)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[3e4, -3e4]]], requires_grad=True)
    loss = fused(logits, torch.tensor([[[0.0, 1.0]]]), torch.ones(1), temp=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(6e5)
    torch.testing.assert_close(logits.grad, torch.tensor([[[10.0, -10.0]]]))


def test_nothing_is_differentiated_where_nothing_is_asked_for() -> None:
    logits, targets, weights = make(3, 2, False)
    with torch.no_grad():
        loss = fused(logits, targets, weights, temp=0.1)
    assert not loss.requires_grad
    assert fused(logits[:0], targets[:0], weights[:0], temp=0.1).item() == 0.0


def test_going_backward_twice_is_an_error() -> None:
    logits, targets, weights = make(3, 2, False)
    loss = fused(logits, targets, weights, temp=0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()
