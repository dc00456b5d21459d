import pytest
import torch
import torch.nn.functional as F

from cytoray.errors import InputError
from cytoray.mil.dtfd import DTFD, deal_pseudo_bags
from cytoray.mil.packing import pack

from .conftest import check_parity


def gated(scorer, hidden):
    branch = torch.tanh(scorer.value(hidden)) * torch.sigmoid(scorer.gate(hidden))
    return scorer.score(branch)[:, 0].softmax(0)


def plain_dtfd(distillation):
    def reference(aggregator, bag):
        pseudo = deal_pseudo_bags(torch.tensor([0, len(bag)]), 4, shuffle_seed=0)
        hidden = F.relu(bag @ aggregator.embed[0].weight.T)
        distilled, owners, inner = [], [], torch.zeros(len(bag))
        for part in range(int(pseudo.max()) + 1):
            members = torch.nonzero(pseudo == part)[:, 0]
            attention = gated(aggregator.attention, hidden[members])
            inner[members] = attention.detach()
            weighted = attention[:, None] * hidden[members]
            activation = (weighted @ aggregator.pseudo_classifier.weight.T).softmax(1)
            rank = [1 - p for p in activation[:, 0].tolist()]
            picks = {
                "afs": [weighted.sum(0)],
                "max": [hidden[members[rank.index(max(rank))]]],
                "maxmin": [
                    hidden[members[rank.index(max(rank))]],
                    hidden[members[rank.index(min(rank))]],
                ],
            }[distillation]
            distilled += picks
            owners += [part] * len(picks)
        stacked = torch.stack(distilled).detach()
        share = gated(aggregator.tier2_attention, stacked)
        outer = torch.zeros(int(pseudo.max()) + 1)
        for owner, value in zip(owners, share.detach(), strict=True):
            outer[owner] += value
        return aggregator.classifier((share[:, None] * stacked).sum(0)), inner * outer[pseudo]

    return reference


@pytest.mark.parametrize("distillation", ["afs", "max", "maxmin"])
def test_equals_a_plain_loop(distillation, bags):
    aggregator = DTFD(24, 3, hidden_dim=32, attention_dim=16, distillation=distillation).eval()
    check_parity(aggregator, bags, plain_dtfd(distillation))


def test_second_tier_sends_no_gradient_into_the_first(bags):
    aggregator, labels = DTFD(24, 3, hidden_dim=32), torch.tensor([0, 2, 1])
    output = aggregator(*pack(bags))
    terms = aggregator.loss(output, labels)
    first = [*aggregator.embed.parameters(), *aggregator.attention.parameters()]
    second = list(aggregator.tier2_attention.parameters())
    grads = torch.autograd.grad(terms["bag"], first + second, allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in grads[: len(first)])
    assert any(bool(grad.any()) for grad in grads[len(first) :] if grad is not None)
    pseudo = torch.autograd.grad(terms["pseudo_bag"], first + second, allow_unused=True)
    assert all(grad is not None for grad in pseudo[: len(first)])
    assert all(grad is None for grad in pseudo[len(first) :])


def test_every_pseudo_bag_carries_its_bags_label(bags):
    aggregator, labels = DTFD(24, 3, hidden_dim=32), torch.tensor([0, 2, 1])
    output = aggregator(*pack(bags))
    assert output.aux["num_pseudo"].tolist() == [1, 4, 4]
    expected = F.cross_entropy(output.aux["pseudo_logits"], torch.tensor([0, *[2] * 4, *[1] * 4]))
    assert torch.allclose(aggregator.loss(output, labels)["pseudo_bag"], expected)


def test_pseudo_bags_are_even_and_dealt_anew_in_training():
    offsets = torch.tensor([0, 10, 12])
    first = deal_pseudo_bags(offsets, 4, shuffle_seed=None)
    again = deal_pseudo_bags(offsets, 4, shuffle_seed=None)
    assert sorted(torch.bincount(first).tolist()) == [1, 1, 2, 2, 3, 3]
    assert first[10:].min() == 4
    assert not torch.equal(first, again)
    fixed = deal_pseudo_bags(offsets, 4, shuffle_seed=0)
    assert torch.equal(fixed, deal_pseudo_bags(offsets, 4, shuffle_seed=0))
    with pytest.raises(InputError, match="afs, max, maxmin"):
        DTFD(24, 2, distillation="mean")
