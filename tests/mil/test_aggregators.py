import pytest
import torch
import torch.nn.functional as F

from cytoray.errors import InputError
from cytoray.mil.aggregators import AGGREGATORS, build_aggregator
from cytoray.mil.base import group_bags
from cytoray.mil.packing import pack

from .conftest import check_parity


def plain_mean(aggregator, bag):
    total = sum(bag[i] for i in range(len(bag))) / len(bag)
    return aggregator.classifier(total), torch.full((len(bag),), 1 / len(bag))


def plain_max(aggregator, bag):
    values, where = bag.max(dim=0)
    share = torch.bincount(where, minlength=len(bag)).float() / bag.shape[1]
    return aggregator.classifier(values), share


def plain_abmil(aggregator, bag):
    """Instance by instance, from the published equations."""
    embed, scorer = aggregator.embed[0], aggregator.attention
    hidden = [torch.clamp(embed.weight @ x + embed.bias, min=0) for x in bag]
    scores = []
    for h in hidden:
        branch = torch.tanh(scorer.value.weight @ h + scorer.value.bias)
        if scorer.gate is not None:
            branch = branch / (1 + torch.exp(-(scorer.gate.weight @ h + scorer.gate.bias)))
        scores.append(scorer.score.weight[0] @ branch + scorer.score.bias[0])
    weights = torch.stack(scores).exp()
    weights = weights / weights.sum()
    pooled = sum(w * h for w, h in zip(weights, hidden, strict=True))
    return aggregator.classifier(pooled), weights.detach()


@pytest.mark.parametrize("num_classes", [2, 5, (2, 3)])
@pytest.mark.parametrize(
    ("name", "reference", "options"),
    [
        ("mean", plain_mean, {}),
        ("max", plain_max, {}),
        ("abmil", plain_abmil, {"hidden_dim": 32, "attention_dim": 16}),
        ("abmil", plain_abmil, {"hidden_dim": 32, "attention_dim": 16, "gated": False}),
    ],
)
def test_equals_a_plain_loop(name, reference, options, num_classes, bags):
    check_parity(build_aggregator(name, 24, num_classes, **options), bags, reference)


SMALL = {"transmil": {"num_landmarks": 32}}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_bag_does_not_feel_its_neighbours(name, bags):
    aggregator = build_aggregator(name, 24, 3, **SMALL.get(name, {})).eval()
    with torch.no_grad():
        before = aggregator(*pack(bags))
        after = aggregator(*pack([1e3 * torch.randn(50, 24), bags[1], bags[2], bags[0]]))
    assert torch.allclose(before.logits[[1, 2, 0]], after.logits[1:], atol=1e-5)
    assert torch.allclose(before.attention[1:8], after.attention[50:57], atol=1e-6)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_groups_of_bags_give_the_same_answer(name, bags, monkeypatch):
    aggregator = build_aggregator(name, 24, 3, **SMALL.get(name, {})).eval()
    batch, labels = pack([bags[1], bags[0], bags[2], bags[1]]), torch.tensor([0, 2, 1, 1])
    outputs = []
    for limit in (10**6, 8):
        monkeypatch.setattr(type(aggregator), "cpu_instances", limit)
        outputs.append(aggregator(*batch))
    whole, groups = outputs
    assert torch.allclose(whole.logits, groups.logits, atol=1e-5)
    assert torch.allclose(whole.attention, groups.attention, atol=1e-6)
    assert {k: v.shape for k, v in whole.aux.items()} == {k: v.shape for k, v in groups.aux.items()}
    for a, b in zip(*(aggregator.loss(o, labels).values() for o in outputs), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_groups_hold_whole_bags_up_to_the_limit():
    assert group_bags([0, 3, 5, 9, 10], 5) == [(0, 2), (2, 4)]
    assert group_bags([0, 100, 101, 102, 300], 5) == [(0, 1), (1, 3), (3, 4)]
    assert group_bags([0, 4], 2) == [(0, 1)]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_learns_from_half_precision_and_refuses_empty_bags(name, bags):
    aggregator = build_aggregator(name, 24, 3, **SMALL.get(name, {}))
    features, offsets = pack([bag.half() for bag in bags])
    output = aggregator(features, offsets)
    terms = aggregator.loss(output, torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 0.5]))
    torch.stack(list(terms.values())).sum().backward()
    assert output.logits.shape == (3, 3)
    assert output.attention.shape == (308,)
    for parameter in aggregator.parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all())
    assert any(p.grad is not None and bool(p.grad.any()) for p in aggregator.parameters())
    with pytest.raises(InputError, match=r"empty bag at position \[1\]"):
        aggregator(features, torch.tensor([0, 8, 8, 308]))
    with pytest.raises(InputError, match="in_dim"):
        aggregator(features[:, :5], offsets)


def test_class_weight_enters_the_loss(bags):
    aggregator = build_aggregator("mean", 24, 3)
    output, labels = aggregator(*pack(bags)), torch.tensor([0, 1, 1])
    weight = torch.tensor([2.0, 1.0, 1.0])
    nll = -output.logits.log_softmax(1)[torch.arange(3), labels]
    expected = (weight[labels] * nll).sum() / weight[labels].sum()
    assert torch.allclose(aggregator.loss(output, labels, weight)["bag"], expected)
    assert torch.allclose(
        aggregator.loss(output, labels)["bag"], F.cross_entropy(output.logits, labels)
    )


@pytest.mark.parametrize("name", [n for n, kind in AGGREGATORS.items() if kind.multi_task])
def test_several_tasks_are_one_head_with_labels_of_their_own(name, bags):
    aggregator = build_aggregator(name, 24, (2, 3), **SMALL.get(name, {})).eval()
    output = aggregator(*pack(bags))
    assert [logits.shape for logits in output.task_logits] == [(3, 2), (3, 3)]
    assert torch.equal(output.logits, output.task_logits[0])
    labels = torch.tensor([[0, -1], [1, 2], [-1, 0]])
    terms = aggregator.loss(output, labels)
    torch.stack(list(terms.values())).sum().backward()
    if len(terms) == 1:
        first = F.cross_entropy(output.task_logits[0][:2], labels[:2, 0])
        second = F.cross_entropy(output.task_logits[1][1:], labels[1:, 1])
        assert torch.allclose(terms["bag"], (first + second) / 2)
    unlabelled = aggregator.loss(aggregator(*pack(bags)), torch.full((3, 2), -1))
    assert all(float(value.detach()) == 0.0 for value in unlabelled.values())


def test_wrong_names_are_answered_with_the_valid_ones():
    with pytest.raises(InputError, match="abmil, clam"):
        build_aggregator("abmill", 24, 2)
    with pytest.raises(InputError, match="valid: attention_dim, dropout, gated, hidden_dim"):
        build_aggregator("abmil", 24, 2, gate=True)
    with pytest.raises(InputError, match="2 classes"):
        build_aggregator("abmil", 24, 1)
