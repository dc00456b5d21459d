import math

import pytest
import torch
import torch.nn.functional as F

from cytoray.errors import InputError
from cytoray.mil.aggregators import build_aggregator
from cytoray.mil.packing import pack
from cytoray.mil.unicas import TaskAttention, TaskMoE, UniCAS, top_m_mask

from .conftest import check_parity

OPTIONS = {"num_blocks": 3, "top_m": 20, "num_slots": 4, "expert_ratio": 2.0}


def plain_attention(layer, tokens, patches):
    """Eq. 1-2 with keys, values and zeroed patches written out, one task and one head a time."""
    dim, heads = patches.shape[1], layer.heads
    width = dim // heads
    k = patches @ layer.key.weight.T
    v = patches @ layer.value.weight.T
    new_tokens, summed, weights = [], torch.zeros_like(patches), []
    for task in range(len(tokens)):
        q = layer.query.weight @ tokens[task]
        answer, masked, rows = [], [], []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.stack([(q[part] * row).sum() for row in k[:, part]]) / math.sqrt(width)
            keep = torch.ones(len(patches), dtype=torch.bool)
            if len(patches) > layer.top_m:
                keep = scores >= scores.sort(descending=True).values[layer.top_m - 1]
            row = torch.where(keep, scores, torch.tensor(-torch.inf)).softmax(0)
            answer.append(row @ v[:, part])
            masked.append(patches[:, part] * keep[:, None])
            rows.append(row)
        joined = torch.cat([torch.cat(answer)[None], torch.cat(masked, dim=1)])
        projected = joined @ layer.project[task].weight.T
        new_tokens.append(projected[0])
        summed = summed + projected[1:]
        weights.append(sum(rows) / heads)
    return torch.cat([torch.stack(new_tokens), summed]), torch.stack(weights)


def plain_moe(layer, x):
    """Eq. 3-5, one slot at a time."""
    if layer.unit_tokens:
        x = x / x.norm(dim=1, keepdim=True)
    scores = x @ layer.slots
    into, out = scores.softmax(dim=0), scores.softmax(dim=1)
    total = torch.zeros_like(x)
    for j in range(scores.shape[1]):
        slot = (into[:, j : j + 1] * x).sum(0)
        hidden = F.gelu(slot @ layer.up[j] + layer.up_bias[j, 0])
        total = total + out[:, j : j + 1] * (hidden @ layer.down[j] + layer.down_bias[j, 0])
    return total


def plain_position(position, patches):
    side = math.isqrt(len(patches))
    square = patches.T.reshape(1, -1, side, side)
    encoded = square
    for conv in position.convolutions:
        encoded = encoded + F.conv2d(
            square,
            conv.weight,
            conv.bias,
            padding=conv.weight.shape[-1] // 2,
            groups=square.shape[1],
        )
    return encoded[0].flatten(1).T


def plain_unicas(aggregator, bag):
    """One bag through the blocks, all tokens in one matrix."""
    count, tasks = len(bag), len(aggregator.task_classes)
    patches = aggregator.embed(bag)
    if aggregator.position is not None:
        side = math.ceil(math.sqrt(count))
        patches = torch.cat([patches, patches[: side * side - count]])
    x = torch.cat([aggregator.task_tokens, patches])
    weights = torch.zeros(tasks, len(patches))
    for index in range(len(aggregator.moes)):
        normed = aggregator.attention_norms[index](x)
        change, weights = plain_attention(
            aggregator.attentions[index], normed[:tasks], normed[tasks:]
        )
        x = x + change
        x = x + plain_moe(aggregator.moes[index], aggregator.moe_norms[index](x))
        if index == 0 and aggregator.position is not None:
            x = torch.cat([x[:tasks], plain_position(aggregator.position, x[tasks:])])
    tokens = aggregator.norm(x[:tasks])
    logits = torch.cat([head(tokens[t]) for t, head in enumerate(aggregator.heads)])
    first = weights[0].detach()
    attention = first[:count].clone()
    attention[: len(first) - count] += first[count:]
    return logits, attention


@pytest.mark.parametrize("num_classes", [3, (2, 5, 2)])
@pytest.mark.parametrize(
    "options", [{}, {"hidden_dim": 32}, {"released": True, "hidden_dim": 48}, {"top_m": 256}]
)
def test_equals_a_plain_loop(num_classes, options, bags):
    aggregator = UniCAS(24, num_classes, **(OPTIONS | options))
    check_parity(aggregator, bags, plain_unicas)


def test_default_is_the_papers_size():
    aggregator = build_aggregator("unicas", 16, (2, 2, 2))
    assert len(aggregator.moes) == len(aggregator.attentions) == 8
    assert aggregator.attentions[0].top_m == 256
    assert aggregator.moes[0].up.shape == (8, 16, 64)
    assert sum(p.numel() for p in aggregator.moes[0].up) == 8 * 16 * 64
    assert [head.out_features for head in aggregator.heads] == [2, 2, 2]


def test_top_m_keeps_m_and_all_that_tie():
    scores = torch.tensor([[5.0, 1.0, 4.0, 4.0, 4.0, 0.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    mask = top_m_mask(scores, 2)
    assert mask.tolist() == [[True, False, True, True, True, False], [True, True] + [False] * 4]
    shuffled = torch.randperm(6)
    assert torch.equal(top_m_mask(scores[:, shuffled], 2), mask[:, shuffled])
    assert bool(top_m_mask(scores, 6).all())


def test_tasks_do_not_share_queries_but_share_keys_and_values():
    layer = TaskAttention(8, 3)
    names = {name.split(".")[0] for name, _ in layer.named_parameters()}
    assert names == {"query", "key", "value", "project"}
    assert len(layer.project) == 3


def test_slots_are_means_over_one_bag_only():
    """Softmax over the tokens of each bag: scaling another bag's rows changes nothing."""
    aggregator = UniCAS(24, 2, **OPTIONS).eval()
    first, other = torch.randn(9, 24), torch.randn(30, 24)
    with torch.no_grad():
        alone = aggregator(*pack([first])).logits
        beside = aggregator(*pack([50 * other, first, other])).logits[1:2]
    assert torch.allclose(alone, beside, atol=1e-5)
    moe = TaskMoE(24, num_slots=4)
    with torch.no_grad():
        moe.slots.zero_()
    assert torch.equal((torch.randn(5, 24) @ moe.slots).softmax(0), torch.full((5, 4), 0.2))


def test_order_of_the_instances_does_not_matter():
    aggregator, bag = UniCAS(24, (2, 3), **OPTIONS).eval(), torch.randn(90, 24)
    order = torch.randperm(90)
    with torch.no_grad():
        straight, shuffled = aggregator(*pack([bag])), aggregator(*pack([bag[order]]))
    assert torch.allclose(straight.logits, shuffled.logits, atol=1e-5)
    assert torch.allclose(straight.attention[order], shuffled.attention, atol=1e-5)


def test_attention_is_on_at_most_m_instances_of_each_task(bags):
    aggregator = UniCAS(24, (2, 2), **OPTIONS)
    weights = aggregator(*pack(bags)).aux["task_attention"]
    assert weights.shape == (308, 2)
    assert (weights[8:] > 0).sum(0).tolist() == [20, 20]
    assert torch.allclose(weights[8:].sum(0), torch.ones(2))


def test_missing_labels_give_no_loss_and_no_gradient(bags):
    aggregator = UniCAS(24, (2, 3), **OPTIONS)
    labels = torch.tensor([[1, -1], [-1, -1], [0, -1]])
    output = aggregator(*pack(bags))
    loss = aggregator.loss(output, labels)["bag"]
    expected = F.cross_entropy(output.task_logits[0][[0, 2]], torch.tensor([1, 0])) / 2
    assert torch.allclose(loss, expected)
    loss.backward()
    assert not aggregator.heads[1].weight.grad.any()
    assert bool(aggregator.heads[0].weight.grad.any())
    nothing = aggregator.loss(aggregator(*pack(bags)), torch.full((3, 2), -1))["bag"]
    assert float(nothing.detach()) == 0.0
    nothing.backward()
    with pytest.raises(InputError, match="labels of 1 tasks for a head of 2"):
        aggregator.loss(output, labels[:, 0])


def test_class_weight_of_each_task(bags):
    aggregator = UniCAS(24, (2, 3), **OPTIONS)
    output, labels = aggregator(*pack(bags)), torch.tensor([[1, 2], [0, -1], [1, 0]])
    weights = (torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0, 0.5]))
    first = F.cross_entropy(output.task_logits[0], labels[:, 0], weights[0])
    second = F.cross_entropy(output.task_logits[1][[0, 2]], labels[[0, 2], 1], weights[1])
    assert torch.allclose(aggregator.loss(output, labels, weights)["bag"], (first + second) / 2)


def test_what_does_not_fit_is_said():
    with pytest.raises(InputError, match="multiple of the 12 heads"):
        UniCAS(24, 2, released=True, hidden_dim=40)
    with pytest.raises(InputError, match="1 or more"):
        UniCAS(24, 2, top_m=0)
    with pytest.raises(InputError, match="one task at a time, got 2"):
        build_aggregator("clam", 24, (2, 2))
    with pytest.raises(InputError, match="2 classes"):
        build_aggregator("unicas", 24, (2, 1))
