import pytest
import torch
import torch.nn.functional as F

from cytoray.errors import InputError
from cytoray.mil.clam import CLAM, CLAMMB, smooth_top1_svm
from cytoray.mil.packing import pack

from .conftest import check_parity
from .test_aggregators import plain_abmil


def make(**options):
    return CLAM(24, 3, hidden_dim=32, attention_dim=16, dropout=0.0, **options)


def plain_instance_loss(aggregator, bag, label, subtyping):
    hidden = F.relu(F.linear(bag, aggregator.embed[0].weight, aggregator.embed[0].bias))
    _, attention = plain_abmil(aggregator, bag)
    order = sorted(range(len(bag)), key=lambda i: float(attention[i]))
    k = min(8, len(bag) // 2)
    if k == 0:
        return torch.zeros(())
    top, bottom = hidden[order[-k:]], hidden[order[:k]]

    def nll(instances, classifier, target):
        return -classifier(instances).log_softmax(1)[:, target]

    branches = aggregator.instance_classifiers
    total = torch.cat([nll(top, branches[label], 1), nll(bottom, branches[label], 0)]).mean()
    if subtyping:
        for other in range(3):
            if other != label:
                total = total + nll(top, branches[other], 0).mean()
        total = total / 3
    return total


def test_bag_branch_equals_a_plain_loop(bags):
    check_parity(make(), bags, plain_abmil)


@pytest.mark.parametrize("subtyping", [False, True])
def test_loss_equals_a_plain_loop(subtyping, bags):
    aggregator, labels = make(subtyping=subtyping), torch.tensor([0, 2, 1])
    output = aggregator(*pack(bags))
    terms = aggregator.loss(output, labels)
    expected = torch.stack(
        [
            plain_instance_loss(aggregator, bag, int(label), subtyping)
            for bag, label in zip(bags, labels, strict=True)
        ]
    ).mean()
    assert torch.allclose(terms["instance"], 0.3 * expected, atol=1e-6)
    assert torch.allclose(terms["bag"], 0.7 * F.cross_entropy(output.logits, labels))
    mine = torch.autograd.grad(terms["instance"], aggregator.embed.parameters())
    theirs = torch.autograd.grad(0.3 * expected, aggregator.embed.parameters())
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def make_mb(**options):
    return CLAMMB(24, 3, hidden_dim=32, attention_dim=16, dropout=0.0, **options)


def plain_mb_parts(aggregator, bag):
    """Hidden features, and one softmax of the instances a class."""
    scorer = aggregator.attention
    hidden = F.relu(aggregator.embed[0](bag))
    branch = torch.tanh(scorer.value(hidden)) * torch.sigmoid(scorer.gate(hidden))
    columns = [(branch @ scorer.score.weight[c] + scorer.score.bias[c]) for c in range(3)]
    return hidden, [column.softmax(0) for column in columns]


def plain_mb(aggregator, bag):
    hidden, attention = plain_mb_parts(aggregator, bag)
    weight, bias = aggregator.classifier.weight, aggregator.classifier.bias
    logits = torch.stack([(attention[c] @ hidden) @ weight[c] + bias[c] for c in range(3)])
    return logits, attention[int(logits.argmax())].detach()


def test_multi_branch_equals_a_plain_loop(bags):
    check_parity(make_mb(), bags, plain_mb)


@pytest.mark.parametrize("subtyping", [False, True])
def test_multi_branch_instances_are_each_class_s_own(subtyping, bags):
    aggregator, labels = make_mb(subtyping=subtyping), [0, 2, 1]
    terms = aggregator.loss(aggregator(*pack(bags)), torch.tensor(labels))
    total = torch.zeros(())
    for bag, label in zip(bags, labels, strict=True):
        hidden, attention = plain_mb_parts(aggregator, bag)
        k = min(8, len(bag) // 2)
        if k == 0:
            continue
        for branch in range(3) if subtyping else [label]:
            order = attention[branch].argsort(descending=True)
            shown, targets = hidden[order[:k]], [int(branch == label)] * k
            if branch == label:
                shown, targets = torch.cat([shown, hidden[order[-k:]]]), targets + [0] * k
            logits = aggregator.instance_classifiers[branch](shown)
            part = F.cross_entropy(logits, torch.tensor(targets))
            total = total + part / (3 if subtyping else 1)
    assert torch.allclose(terms["instance"], 0.3 * total / 3, atol=1e-6)


def test_bags_without_a_label_give_no_loss(bags):
    aggregator = make()
    output = aggregator(*pack(bags))
    terms = aggregator.loss(output, torch.tensor([-1, 2, -1]))
    alone = aggregator.loss(aggregator(*pack(bags[1:2])), torch.tensor([2]))
    assert torch.allclose(terms["bag"], alone["bag"], atol=1e-6)
    assert torch.allclose(terms["instance"], alone["instance"], atol=1e-6)
    none = aggregator.loss(output, torch.full((3,), -1))
    assert [float(value.detach()) for value in none.values()] == [0.0, 0.0]


def test_smooth_svm_is_the_published_formula():
    logits, targets = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    expected = [
        torch.log(sum(torch.exp(row[j] + float(j != y) - row[y]) for j in range(2)))
        for row, y in zip(logits, targets.tolist(), strict=True)
    ]
    assert torch.allclose(smooth_top1_svm(logits, targets), torch.stack(expected))
    with pytest.raises(InputError, match="ce, svm"):
        make(instance_loss="hinge")
