import math

import pytest
import torch
import torch.nn.functional as F

from cytoray.ssl.losses import (
    TARGETS,
    MovingCentre,
    build_targets,
    dino_loss,
    ibot_loss,
    koleo,
    koleo_loss,
    sinkhorn_knopp,
)
from cytoray.ssl.monitor import effective_rank, entropy, feature_std


def _cross_entropy(target, logits, temp):
    top = max(v / temp for v in logits)
    log_sum = top + math.log(sum(math.exp(v / temp - top) for v in logits))
    return -sum(t * (v / temp - log_sum) for t, v in zip(target, logits, strict=True))


@pytest.mark.parametrize(("num_global", "num_local"), [(2, 0), (2, 3), (1, 2), (3, 1)])
def test_dino_loss_against_loops(num_global, num_local):
    torch.manual_seed(0)
    tiles, k = 3, 7
    targets = torch.softmax(torch.randn(tiles, num_global, k), -1)
    student = torch.randn(tiles, num_global + num_local, k).clamp(-1, 1)
    terms = [
        _cross_entropy(targets[i, t].double().tolist(), student[i, s].double().tolist(), 0.1)
        for i in range(tiles)
        for t in range(num_global)
        for s in range(num_global + num_local)
        if s != t
    ]
    got = dino_loss(
        student[:, :num_global],
        student[:, num_global:] if num_local else None,
        targets,
        student_temp=0.1,
        global_batch=tiles,
    )
    assert got.item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_dino_loss_and_centre_against_lightly():
    lightly = pytest.importorskip("lightly.loss")
    torch.manual_seed(0)
    reference = lightly.DINOLoss(output_dim=16, student_temp=0.1, center_momentum=0.9)
    centre, frugal = MovingCentre(16, momentum=0.9), MovingCentre(16, momentum=0.9)
    for temp in (0.04, 0.05, 0.07):
        teacher = torch.randn(5, 2, 16)
        student = torch.randn(5, 6, 16, requires_grad=True)
        expected = reference(list(teacher.unbind(1)), list(student.unbind(1)), teacher_temp=temp)
        targets = centre(teacher.flatten(0, 1), temp=temp).unflatten(0, (5, 2))
        again = frugal(teacher.flatten(0, 1).clone(), temp=temp, overwrite=True)
        assert torch.equal(again.unflatten(0, (5, 2)), targets)
        got = dino_loss(student[:, :2], student[:, 2:], targets, student_temp=0.1, global_batch=5)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
        wanted = torch.autograd.grad(expected, student)[0]
        torch.testing.assert_close(
            torch.autograd.grad(got, student)[0], wanted, atol=1e-6, rtol=1e-5
        )
    torch.testing.assert_close(centre.centre, reference.center.flatten(), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_compiled_targets_are_those_of_fp32(name, lazy, backend):
    torch.manual_seed(0)
    kept, made_anew = (build_targets(name, 16, centre_momentum=0.9) for _ in range(2))
    made_anew.compile_backend = backend
    torch._dynamo.reset()
    codes = []
    for rows, temp in ((5, 0.04), (8, 0.05), (0, 0.05), (9, 0.06), (7, 0.07)):
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(rows, 16).to(dtype)
            expected = kept(logits.float(), temp=temp)
            got = made_anew(logits, temp=temp, overwrite=True, lazy=lazy)
            if lazy and rows:
                assert got.logits is logits  # nothing of that size was written
                first, rest = got.split([2, rows - 2])
                assert torch.equal(torch.cat([first.written(), rest.written()]), got.written())
                got = got.written()
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        codes.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert codes[-1] == codes[1]  # neither rows nor temperature ask for new code
    for mine, reference in zip(made_anew.buffers(), kept.buffers(), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-6)


def test_ibot_loss_against_lightly_and_loops():
    lightly = pytest.importorskip("lightly.loss")
    torch.manual_seed(0)
    mask = torch.rand(6, 4, 4) < 0.3
    mask[2:4] = False
    teacher, student = torch.randn(int(mask.sum()), 9), torch.randn(int(mask.sum()), 9)
    expected = lightly.IBOTPatchLoss(output_dim=9, student_temp=0.1)(
        teacher, student, mask, teacher_temp=0.05
    )
    targets = MovingCentre(9)(teacher, temp=0.05)
    count = mask.sum((1, 2), keepdim=True)
    weights = (1.0 / count.clamp(min=1)).expand(6, 4, 4)[mask]
    got = ibot_loss(student, targets, weights, student_temp=0.1, global_crops=6)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)

    per_crop = []
    crop_of = mask.nonzero()[:, 0].tolist()
    for crop in range(6):
        rows = [r for r, c in enumerate(crop_of) if c == crop]
        terms = [_cross_entropy(targets[r].tolist(), student[r].tolist(), 0.1) for r in rows]
        per_crop.append(sum(terms) / len(terms) if terms else 0.0)
    assert got.item() == pytest.approx(sum(per_crop) / 6, rel=1e-5)


def test_ibot_loss_without_masked_patches_is_zero():
    student = torch.zeros(0, 9, requires_grad=True)
    loss = ibot_loss(student, torch.zeros(0, 9), torch.zeros(0), student_temp=0.1, global_crops=4)
    loss.backward()
    assert loss.item() == 0.0


def test_koleo_against_lightly_and_loops():
    lightly = pytest.importorskip("lightly.loss")
    torch.manual_seed(0)
    features = torch.randn(9, 2, 12, requires_grad=True)
    expected = sum(lightly.KoLeoLoss()(x) for x in features.unbind(1))
    got = koleo_loss(features, global_batch=9, offset=0)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(got, features)[0], torch.autograd.grad(expected, features)[0]
    )
    x = F.normalize(features[:, 0].double().detach(), dim=-1)
    nearest = [min((x[i] - x[j]).norm().item() for j in range(9) if j != i) for i in range(9)]
    slow = -sum(math.log(d) for d in nearest) / 9
    assert koleo(features[:, 0]).item() == pytest.approx(slow, rel=1e-5)


def test_koleo_is_in_fp32_under_autocast():
    features = torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(koleo(features), koleo(features.clone()))
        inside = koleo(features)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, koleo(features))


def _sinkhorn_by_rewriting(logits, temp, iterations=3):
    q = torch.exp(logits.double() / temp).T
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * k
        q /= q.sum(0, keepdim=True) * b
    return (q * b).T


@pytest.mark.parametrize("temp", [0.04, 0.07, 1.0])
def test_sinkhorn_against_the_rewritten_matrix(temp):
    torch.manual_seed(0)
    logits = torch.rand(12, 20) * 2 - 1
    got = sinkhorn_knopp(logits, temp=temp)
    torch.testing.assert_close(
        got.double(), _sinkhorn_by_rewriting(logits, temp), atol=1e-6, rtol=1e-4
    )
    torch.testing.assert_close(got.sum(1), torch.ones(12))
    assert torch.equal(sinkhorn_knopp(logits.clone(), temp=temp, overwrite=True), got)


def test_sinkhorn_spreads_mass_and_does_not_overflow():
    logits = torch.zeros(64, 8)
    logits[:, 0] = 300.0
    logits += torch.rand(64, 8) * 0.01
    out = sinkhorn_knopp(logits * 0.01, temp=0.1, iterations=50)
    torch.testing.assert_close(out.sum(0), torch.full((8,), 8.0), atol=0.1, rtol=0.02)
    assert sinkhorn_knopp(logits, temp=0.04).isfinite().all()
    assert sinkhorn_knopp(logits[:0], temp=0.04).shape == (0, 8)
    assert torch.equal(logits[:, 0] > 1, torch.ones(64, dtype=torch.bool))  # input untouched


def test_a_row_maximum_would_change_the_result():
    logits = torch.rand(12, 20)
    logits[0] += 1.0
    shifted = logits - logits.max(1, keepdim=True).values
    assert not torch.allclose(
        sinkhorn_knopp(logits, temp=0.5, iterations=1),
        sinkhorn_knopp(shifted, temp=0.5, iterations=1),
        atol=1e-4,
    )


def test_centre_ignores_what_is_not_finite():
    centre = MovingCentre(3)
    centre(torch.full((2, 3), torch.nan), temp=0.1)
    centre(torch.zeros(0, 3), temp=0.1)
    assert torch.equal(centre.centre, torch.zeros(3))


def test_collapse_indicators():
    torch.manual_seed(0)
    spread = torch.randn(4000, 8)
    assert feature_std(spread).item() == pytest.approx(1.0, abs=0.01)
    assert effective_rank(spread).item() == pytest.approx(8.0, abs=0.1)
    assert effective_rank(spread[:3]) <= 2.0 + 1e-5  # three rows span a plane
    same = torch.randn(1, 8).expand(10, 8)
    assert feature_std(same).item() < 1e-4
    line = torch.randn(8) + 0.01 * torch.randn(100, 1) * torch.randn(8)
    assert effective_rank(line).item() == pytest.approx(1.0, abs=0.05)
    spectrum = torch.linalg.svdvals(
        F.normalize(spread[:50], dim=1) - F.normalize(spread[:50], dim=1).mean(0)
    ).square()
    expected = spectrum.sum() ** 2 / spectrum.square().sum()
    torch.testing.assert_close(effective_rank(spread[:50]), expected, rtol=1e-4, atol=1e-4)
    assert entropy(torch.full((2, 16), 1 / 16)).tolist() == pytest.approx([math.log(16)] * 2)
    assert entropy(torch.eye(3)).tolist() == [0.0, 0.0, 0.0]
