"""Parts of a projection: views, with the gradient that autograd has for views.

Without a GPU Triton interprets the kernel (conftest).
"""

import pytest
import torch

pytest.importorskip("triton")
from cytoray.models import projection_parts as parts_module
from cytoray.models.projection_parts import join_gradients, projection_parts

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES, HEADS, WIDTH = ((3, 17), (4, 5)), 3, 8
ROWS = sum(crops * tokens for crops, tokens in SIZES)


def _rows():
    made = torch.randn(ROWS, 3 * HEADS * WIDTH, generator=torch.Generator().manual_seed(0))
    return made.to(DEVICE).requires_grad_()


def _mixed(rows, sizes=SIZES):
    """A number that hangs on every part in another way, and on two of them in other orders."""
    total = rows.new_zeros(())
    for q, k, v in projection_parts(rows, sizes, HEADS):
        total = total + (torch.tanh(q) @ k.mT).square().sum()
        total = total + v.transpose(1, 2).flatten(2).cumsum(-1).square().sum() + v[..., :2].sum()
    return total


def _joined(monkeypatch):
    monkeypatch.setattr(parts_module, "_joins", lambda rows: True)


def test_parts_are_views_of_their_rows():
    rows = _rows().detach()
    (q, _, v), (_, k, _) = projection_parts(rows, SIZES, HEADS)
    assert q.shape == (3, HEADS, 17, WIDTH)
    assert k.shape == (4, HEADS, 5, WIDTH)
    wide = HEADS * WIDTH
    torch.testing.assert_close(q[1, 2, 3], rows[17 + 3, 2 * WIDTH : 3 * WIDTH])
    torch.testing.assert_close(v[0, 0, 16], rows[16, 2 * wide : 2 * wide + WIDTH])
    torch.testing.assert_close(k[3, 1, 4], rows[-1, wide + WIDTH : wide + 2 * WIDTH])
    assert all(part.data_ptr() >= rows.data_ptr() for part in (q, k, v))
    assert q.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


@pytest.mark.parametrize("way", ["eager", "compiled", "changing sizes"])
def test_joined_gradients_are_autograds(way, monkeypatch):
    rows = _rows()
    (wanted,) = torch.autograd.grad(_mixed(rows), rows)
    _joined(monkeypatch)
    run = _mixed
    if way != "eager":
        backend = "inductor" if CUDA else "aot_eager"
        dynamic = way == "changing sizes"
        run = torch.compile(_mixed, backend=backend, fullgraph=True, dynamic=dynamic)
    (got,) = torch.autograd.grad(run(rows), rows)
    torch.testing.assert_close(got, wanted)
    assert got.is_contiguous()


def test_a_part_without_use_has_no_gradient(monkeypatch):
    _joined(monkeypatch)
    rows = _rows()
    (_, k, _), _ = projection_parts(rows, SIZES, HEADS)
    (got,) = torch.autograd.grad(k.sum(), rows)
    wanted = torch.zeros_like(got)
    wanted[: 3 * 17, HEADS * WIDTH : 2 * HEADS * WIDTH] = 1
    torch.testing.assert_close(got, wanted)


def test_a_group_may_be_empty(monkeypatch):
    sizes = ((0, 17), (4, 5))
    rows = _rows()[:20]
    (wanted,) = torch.autograd.grad(_mixed(rows, sizes), rows)
    _joined(monkeypatch)
    (got,) = torch.autograd.grad(_mixed(rows, sizes), rows)
    torch.testing.assert_close(got, wanted)


def test_as_an_operation_it_keeps_the_rules():
    grads = [
        torch.randn(crops, tokens, HEADS, WIDTH, device=DEVICE).transpose(1, 2)
        for crops, tokens in SIZES
        for _ in range(3)
    ]
    torch.library.opcheck(join_gradients, (grads,))
