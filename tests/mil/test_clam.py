import pytest
import torch
import torch.nn.functional as F

from cytoray.errors import InputError
from cytoray.mil.clam import CLAM, smooth_top1_svm
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


def test_smooth_svm_is_the_published_formula():
    logits, targets = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    expected = [
        torch.log(sum(torch.exp(row[j] + float(j != y) - row[y]) for j in range(2)))
        for row, y in zip(logits, targets.tolist(), strict=True)
    ]
    assert torch.allclose(smooth_top1_svm(logits, targets), torch.stack(expected).mean())
    with pytest.raises(InputError, match="ce, svm"):
        make(instance_loss="hinge")
