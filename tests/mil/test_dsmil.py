import math

import pytest
import torch
import torch.nn.functional as F

from cytoray.mil.dsmil import DSMIL
from cytoray.mil.packing import pack

from .conftest import check_parity


def plain_dsmil(aggregator, bag):
    instance = aggregator.instance_classifier(bag)
    query = aggregator.query(bag)
    rows = []
    for c in range(instance.shape[1]):
        asked = query[int(instance[:, c].argmax())]
        rows.append(torch.softmax(torch.stack([q @ asked for q in query]) / math.sqrt(128), 0))
    attention = torch.stack(rows, dim=1)
    pooled = attention.T @ bag
    conv = aggregator.bag_classifier
    logits = torch.stack([(conv.weight[c] * pooled).sum() + conv.bias[c] for c in range(len(rows))])
    return logits, attention[:, int(logits[: aggregator.num_classes].argmax())].detach()


@pytest.mark.parametrize("num_classes", [3, (2, 3)])
def test_equals_a_plain_loop(num_classes, bags):
    check_parity(DSMIL(24, num_classes), bags, plain_dsmil)


def test_loss_is_half_bag_half_strongest_instance(bags):
    aggregator, labels = DSMIL(24, 3), torch.tensor([0, 2, 1])
    output = aggregator(*pack(bags))
    strongest = torch.stack([aggregator.instance_classifier(bag).amax(0) for bag in bags])
    terms = aggregator.loss(output, labels)
    assert torch.allclose(
        terms["max_instance"], 0.5 * F.cross_entropy(strongest, labels), atol=1e-6
    )
    assert torch.allclose(terms["bag"], 0.5 * F.cross_entropy(output.logits, labels))
    assert output.aux["class_attention"].shape == (308, 3)


def test_weights_start_orthogonal():
    weight = DSMIL(24, 3).instance_classifier.weight
    assert torch.allclose(weight @ weight.T, torch.eye(3), atol=1e-5)
