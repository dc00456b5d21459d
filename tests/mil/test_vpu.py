import math

import numpy as np
import pytest
import torch
from torch import nn

from cytoray.errors import InputError
from cytoray.mil.vpu import mix, variational_loss, vpu_loss


def test_variational_loss_by_hand():
    """phi(x) = .2, .4, .9: mean .5; phi(p) = .5, .8: mean log = log(.4) / 2."""
    unlabelled, positive = torch.tensor([0.2, 0.4, 0.9]).log(), torch.tensor([0.5, 0.8]).log()
    expected = math.log(0.5) - 0.5 * math.log(0.4)
    assert float(variational_loss(unlabelled, positive)) == pytest.approx(expected, abs=1e-6)


def test_vpu_loss_by_hand():
    unlabelled, positive = torch.tensor([0.2, 0.8]).log(), torch.tensor([0.5]).log()
    mixed, targets = torch.tensor([0.3, 0.6]).log(), torch.tensor([0.6, 0.9])
    consistency = (math.log(2.0) ** 2 + math.log(1.5) ** 2) / 2
    expected = math.log(0.5) - math.log(0.5) + 0.03 * consistency
    assert float(vpu_loss(unlabelled, positive, mixed, targets)) == pytest.approx(expected)
    without = vpu_loss(unlabelled, positive, mixed, targets, mixup_weight=0.0)
    assert float(without) == pytest.approx(0.0, abs=1e-6)


def test_far_negative_log_probabilities_do_not_overflow():
    unlabelled = torch.tensor([-400.0, -500.0], requires_grad=True)
    loss = vpu_loss(unlabelled, torch.tensor([-1.0]), torch.tensor([-5.0]), torch.zeros(1))
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert bool(torch.isfinite(unlabelled.grad).all())


def test_mixtures_lie_between_their_parents():
    unlabelled, positive = torch.zeros(500, 3), torch.arange(1.0, 5.0)[:, None].expand(4, 3)
    log_phi = torch.full((500,), math.log(0.25), requires_grad=True)
    mixture = mix(unlabelled, positive, log_phi, rng=np.random.default_rng(3))
    share = 1.0 - float(mixture.inputs.max()) / 4.0
    assert 0.0 <= share <= 1.0
    assert torch.allclose(mixture.targets, torch.tensor(share * 0.25 + 1.0 - share))
    assert mixture.inputs.unique().numel() == 4
    assert mixture.targets.requires_grad
    shares = [
        1.0 - float(mix(unlabelled[:1], positive[:1], log_phi[:1], rng=rng).inputs.max())
        for rng in map(np.random.default_rng, range(400))
    ]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert np.var(shares) == pytest.approx(0.25 / 1.6, abs=0.02)


def test_it_tells_positives_from_negatives_without_a_negative_label():
    rng = np.random.default_rng(0)
    positives = torch.from_numpy(rng.normal(2.0, 1.0, (200, 2)).astype(np.float32))
    hidden = torch.from_numpy(
        np.concatenate([rng.normal(2.0, 1.0, (150, 2)), rng.normal(-2.0, 1.0, (150, 2))]).astype(
            np.float32
        )
    )
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)

    def log_phi(x):
        return model(x).log_softmax(1)[:, 1]

    for _ in range(80):
        mixture = mix(hidden, positives, log_phi(hidden), rng=rng)
        loss = vpu_loss(
            log_phi(hidden), log_phi(positives), log_phi(mixture.inputs), mixture.targets
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    scores = log_phi(hidden).detach()
    auc = (scores[:150, None] > scores[None, 150:]).float().mean()
    assert float(auc) > 0.98


def test_empty_parts_are_said():
    with pytest.raises(InputError, match="unlabelled and positive"):
        variational_loss(torch.zeros(0), torch.zeros(3))
