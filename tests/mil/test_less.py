import math

import pytest
import torch
import torch.nn.functional as F

from cytoray.errors import InputError
from cytoray.mil.less import LESS
from cytoray.mil.packing import pack

from .conftest import check_parity

OPTIONS = {"hidden_dim": 32, "heads": 4, "num_blocks": 2, "coarse_depth": 2}


def attend(q, k, v, heads):
    """One head at a time: (M, D) queries on (N, D) keys; also the mean weights (M, N)."""
    width, answers, rows = q.shape[1] // heads, [], []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = (q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(1)
        answers.append(weights @ v[:, part])
        rows.append(weights)
    return torch.cat(answers, dim=1), sum(rows) / heads


def plain_self(block, x):
    q, k, v = block.qkv(block.norm1(x)).chunk(3, dim=1)
    x = x + block.out(attend(q, k, v, block.heads)[0])
    first, _, last = block.mlp
    return x + last(F.gelu(first(block.norm2(x))))


def plain_cross(layer, cls, others):
    """The class token in front of the other scale's instances, keys and values written out."""
    cls = layer.enter(cls[None])
    x = layer.norm(torch.cat([cls, others]))
    answer, weights = attend(layer.query(x[:1]), layer.key(x), layer.value(x), layer.heads)
    return layer.leave(cls + layer.out(answer))[0], weights[0, 1:]


def plain_less(aggregator, bag, coarse=None):
    scales = []
    for index, instances in enumerate((bag, bag if coarse is None else coarse)):
        tokens = aggregator.embeds[index](instances)
        scales.append(torch.cat([aggregator.class_tokens[index : index + 1], tokens]))
    weights = None
    for block in aggregator.blocks:
        after = []
        for x, layers in zip(scales, block.blocks, strict=True):
            for layer in layers:
                x = plain_self(layer, x)
            after.append(x)
        fine, _ = plain_cross(block.cross[0], after[0][0], after[1][1:])
        rough, weights = plain_cross(block.cross[1], after[1][0], after[0][1:])
        scales = [torch.cat([fine[None], after[0][1:]]), torch.cat([rough[None], after[1][1:]])]
    logits = [
        head(norm(x[0]))
        for x, norm, head in zip(scales, aggregator.norms, aggregator.heads, strict=True)
    ]
    return sum(logits) / 2, (weights / weights.sum()).detach()


@pytest.mark.parametrize("num_classes", [3, (2, 2)])
def test_equals_a_plain_loop(num_classes, bags):
    check_parity(LESS(24, num_classes, **OPTIONS), bags, plain_less)


def test_two_scales_equal_a_plain_loop(bags):
    aggregator = LESS(24, 3, **OPTIONS)
    coarse = [torch.randn(size, 24) for size in (2, 3, 80)]
    output = aggregator(*pack(bags), coarse=pack(coarse))
    expected = [plain_less(aggregator, *pair) for pair in zip(bags, coarse, strict=True)]
    by_loop = torch.stack([logits for logits, _ in expected])
    assert torch.allclose(output.logits, by_loop, atol=1e-5)
    assert torch.allclose(output.attention, torch.cat([a for _, a in expected]), atol=1e-5)
    parts = output.aux["coarse_attention"].split([2, 3, 80])
    assert [float(part.sum()) for part in parts] == pytest.approx([1.0] * 3)
    weights = torch.arange(9.0).reshape(3, 3)
    parameters = list(aggregator.parameters())
    mine = torch.autograd.grad((output.logits * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((by_loop * weights).sum(), parameters, allow_unused=True)
    used = 0
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            used += 1
            assert torch.allclose(a, b, atol=1e-5 * max(1.0, float(b.abs().max())))
    assert used > 50


def test_published_depths_and_the_second_scale_matters(bags):
    aggregator = LESS(24, 2).eval()
    assert [[len(part) for part in block.blocks] for block in aggregator.blocks] == [[1, 4]] * 3
    with torch.no_grad():
        same = aggregator(*pack(bags), coarse=pack(bags)).logits
        other = aggregator(*pack(bags), coarse=pack([torch.randn(4, 24) for _ in bags])).logits
        assert torch.allclose(same, aggregator(*pack(bags)).logits, atol=1e-6)
    assert not torch.allclose(same, other, atol=1e-3)


def test_what_does_not_fit_is_said(bags):
    with pytest.raises(InputError, match="3 bags but 1 at the coarse scale"):
        LESS(24, 2, **OPTIONS)(*pack(bags), coarse=pack(bags[:1]))
    with pytest.raises(InputError, match="multiple of heads"):
        LESS(24, 2, hidden_dim=40)
