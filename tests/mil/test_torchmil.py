"""Parity with torchmil's ABMIL, which is defined alike; skipped where it is not installed."""

import pytest
import torch
from torch import nn

from cytoray.mil.abmil import ABMIL
from cytoray.mil.packing import pack

models = pytest.importorskip("torchmil.models")


@pytest.mark.parametrize("gated", [False, True])
def test_abmil_equals_torchmils_on_padded_bags(gated, bags):
    mine = ABMIL(24, 2, hidden_dim=32, attention_dim=16, gated=gated)
    front = nn.Sequential(nn.Linear(24, 32), nn.ReLU())
    theirs = models.ABMIL(in_shape=(24,), att_dim=16, gated=gated, feat_ext=front)
    pairs = [
        (front[0], mine.embed[0]),
        (theirs.pool.fc1.module, mine.attention.value),
        *([(theirs.pool.fc_gated.module, mine.attention.gate)] if gated else []),
    ]
    with torch.no_grad():
        for copy, original in pairs:
            copy.load_state_dict(original.state_dict())
        theirs.pool.fc2.weight.copy_(mine.attention.score.weight)
        last = mine.classifier
        theirs.classifier.module.weight.copy_(last.weight[1:] - last.weight[:1])
        theirs.classifier.module.bias.copy_(last.bias[1:] - last.bias[:1])
    padded = nn.utils.rnn.pad_sequence(bags, batch_first=True)
    mask = torch.zeros(padded.shape[:2])
    for row, bag in zip(mask, bags, strict=True):
        row[: len(bag)] = 1.0
    one_logit, two_logits = theirs(padded, mask), mine(*pack(bags)).logits
    difference = two_logits[:, 1] - two_logits[:, 0]
    assert torch.allclose(one_logit, difference, atol=1e-5)
    gradients = [
        torch.autograd.grad(logits.sum(), module.weight, retain_graph=True)[0]
        for logits, module in ((one_logit, front[0]), (difference, mine.embed[0]))
    ]
    assert torch.allclose(*gradients, atol=1e-5)
