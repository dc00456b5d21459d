"""NT-Xent, InfoNCE and BYOL's loss against lightly and against loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from cytoray.ssl.losses import byol_loss, info_nce_loss, nt_xent, nt_xent_loss, queue_loss

TILES, DIM = 5, 7


def _views(seed=0, tiles=TILES):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tiles, 2, DIM, generator=generator).requires_grad_()


def _cosine(a, b):
    a, b = a.double().tolist(), b.double().tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def _cross_entropy(logits, right):
    top = max(logits)
    return top + math.log(sum(math.exp(x - top) for x in logits)) - logits[right]


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_against_lightly(temperature):
    lightly = pytest.importorskip("lightly.loss")
    views = _views()
    expected = lightly.NTXentLoss(temperature=temperature)(views[:, 0], views[:, 1])
    got = nt_xent(views, temperature=temperature)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    wanted = torch.autograd.grad(expected, views)[0]
    torch.testing.assert_close(torch.autograd.grad(got, views)[0], wanted, atol=1e-6, rtol=1e-5)


def test_nt_xent_against_loops():
    views = _views()
    rows = [views[tile, view].detach() for tile in range(TILES) for view in range(2)]
    terms = []
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        partner = i + 1 if i % 2 == 0 else i - 1
        logits = [_cosine(row, rows[j]) / 0.2 for j in others]
        terms.append(_cross_entropy(logits, others.index(partner)))
    got = nt_xent_loss(views, temperature=0.2, global_batch=TILES, offset=0)
    assert got.item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_info_nce_against_loops():
    queries, keys = _views(0)[:, 0], _views(1)[:, 0].detach()
    terms = [
        _cross_entropy([_cosine(q, k) / 0.3 for k in keys], tile)
        for tile, q in enumerate(queries.detach())
    ]
    expected = 2 * 0.3 * sum(terms) / TILES
    got = info_nce_loss(queries, keys, temperature=0.3, offset=0)
    assert got.item() == pytest.approx(expected, rel=1e-6)
    parts = [
        info_nce_loss(queries[start:stop], keys, temperature=0.3, offset=start)
        for start, stop in [(0, 2), (2, TILES)]
    ]
    assert sum(parts).item() == pytest.approx(expected, rel=1e-6)


def test_queue_loss_against_loops():
    queries, keys = _views(0)[:, 0], _views(1)[:, 0].detach()
    queue = F.normalize(torch.randn(9, DIM, generator=torch.Generator().manual_seed(2)), dim=1)
    terms = [
        _cross_entropy([_cosine(q, other) / 0.3 for other in (k, *queue)], 0)
        for q, k in zip(queries.detach(), keys, strict=True)
    ]
    got = queue_loss(queries, keys, queue, temperature=0.3, global_batch=TILES)
    assert got.item() == pytest.approx(sum(terms) / TILES, rel=1e-6)


def test_byol_loss_against_lightly():
    lightly = pytest.importorskip("lightly.loss")
    predictions, targets = _views(0), _views(1).detach()
    criterion = lightly.NegativeCosineSimilarity()
    cosines = criterion(predictions[:, 0], targets[:, 1]) + criterion(
        predictions[:, 1], targets[:, 0]
    )
    expected = 4 + 2 * cosines  # 2 - 2 cos for each of the two views
    got = byol_loss(predictions, targets, global_batch=TILES)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    wanted = torch.autograd.grad(expected, predictions)[0]
    grad = torch.autograd.grad(got, predictions)[0]
    torch.testing.assert_close(grad, wanted, atol=1e-6, rtol=1e-5)
    swapped = predictions.detach().flip(1)
    assert byol_loss(swapped, predictions.detach(), global_batch=TILES).item() == (
        pytest.approx(0, abs=1e-5)
    )


def test_losses_are_float32_under_autocast():
    views = _views()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            nt_xent_loss(views, temperature=0.1, global_batch=TILES, offset=0),
            info_nce_loss(views[:, 0], views[:, 1], temperature=0.1, offset=0),
            byol_loss(views, views.detach(), global_batch=TILES),
        ]
    assert losses[0].item() == pytest.approx(nt_xent(views, temperature=0.1).item(), rel=1e-6)
    assert {loss.dtype for loss in losses} == {torch.float32}
