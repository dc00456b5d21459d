"""The aggregators as they are usually written: one bag at a time, plain torch, published form.

Each function takes an aggregator of the package (for its weights), a bag (N, D) and the label, and
gives logits (C,) of all tasks and the loss. They are what `benchmarks.mil` measures against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cytoray.mil import Aggregator, pack

Plain = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of one bag."""
    return F.cross_entropy(logits[None], label[None])


def dense(layer: Any, x: Tensor) -> Tensor:
    """A linear layer as torch has it, whatever the package's layers do."""
    return F.linear(x, layer.weight, layer.bias)


def dropped(layer: Any, x: Tensor) -> Tensor:
    """Dropout as torch has it."""
    return F.dropout(x, layer.p, layer.training)


def gated(scorer: Any, hidden: Tensor) -> Tensor:
    """Gated attention scores (N, K)."""
    value = dropped(scorer.dropout, torch.tanh(dense(scorer.value, hidden)))
    gate = dropped(scorer.dropout, torch.sigmoid(dense(scorer.gate, hidden)))
    return scorer.score(value * gate)


def embedded(model: Any, bag: Tensor) -> Tensor:
    """Hidden features (N, H) of ABMIL and CLAM."""
    return dropped(model.embed[1], torch.relu(dense(model.embed[0], bag)))


def plain_mean(model: Any, bag: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Mean pooling."""
    logits = model.classifier(bag.mean(dim=0))
    return logits, cross_entropy(logits, label)


def plain_max(model: Any, bag: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Max pooling, and the share of the maxima that each instance holds."""
    values, holders = bag.max(dim=0)
    torch.bincount(holders, minlength=len(bag))
    logits = model.classifier(values)
    return logits, cross_entropy(logits, label)


def plain_abmil(model: Any, bag: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Gated ABMIL."""
    hidden = embedded(model, bag)
    attention = gated(model.attention, hidden).T.softmax(dim=1)
    logits = model.classifier(attention @ hidden)[0]
    return logits, cross_entropy(logits, label)


def plain_clam(model: Any, bag: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """CLAM-SB and -MB with the instance branch of the true class."""
    hidden = embedded(model, bag)
    scores = gated(model.attention, hidden).T
    pooled = scores.softmax(dim=1) @ hidden
    logits = (pooled * model.classifier.weight).sum(dim=1) + model.classifier.bias
    row = scores[int(label) if len(scores) > 1 else 0]
    k = min(model.num_picked, len(bag) // 2)
    picked = torch.cat([row.topk(k).indices, row.topk(k, largest=False).indices])
    targets = torch.tensor([1] * k + [0] * k)
    instance = F.cross_entropy(model.instance_classifiers[int(label)](hidden[picked]), targets)
    return logits, 0.7 * cross_entropy(logits, label) + 0.3 * instance


def plain_dsmil(model: Any, bag: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """DSMIL."""
    instance = model.instance_classifier(bag)
    best = instance.argmax(dim=0)
    inner = torch.relu(dense(model.query[0], bag))
    query = torch.tanh(dense(model.query[2], inner))
    attention = (query @ query[best].T / math.sqrt(query.shape[1])).softmax(dim=0)
    logits = model.bag_classifier((attention.T @ dropped(model.dropout, bag))[None])[0, :, 0]
    strongest = instance.amax(dim=0)
    return logits, 0.5 * (cross_entropy(logits, label) + cross_entropy(strongest, label))


def plain_dtfd(model: Any, bag: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """DTFD-MIL with AFS."""
    order = torch.randperm(len(bag))
    pooled, losses = [], []
    for part in order.tensor_split(min(model.num_pseudo_bags, len(bag))):
        hidden = torch.relu(dense(model.embed[0], bag[part]))
        pooled.append(gated(model.attention, hidden).T.softmax(dim=1) @ hidden)
        losses.append(cross_entropy(model.pseudo_classifier(pooled[-1])[0], label))
    distilled = torch.cat(pooled).detach()
    share = gated(model.tier2_attention, distilled).T.softmax(dim=1)
    logits = model.classifier(share @ distilled)[0]
    return logits, cross_entropy(logits, label) + torch.stack(losses).mean()


def plain_nystrom(layer: Any, tokens: Tensor) -> Tensor:
    """Nyström attention on the padded sequence."""
    count, dim = tokens.shape
    padding = -count % layer.num_landmarks
    padded = F.pad(tokens, (0, 0, padding, 0))
    q, k, v = (
        part.reshape(len(padded), layer.heads, -1).transpose(0, 1)
        for part in dense(layer.to_qkv, padded).chunk(3, dim=1)
    )
    q = q / math.sqrt(dim // layer.heads)
    group = len(padded) // layer.num_landmarks
    q_land, k_land = (x.unflatten(1, (-1, group)).mean(dim=2) for x in (q, k))
    first = (q @ k_land.mT).softmax(dim=-1)
    middle = (q_land @ k_land.mT).softmax(dim=-1)
    last = (q_land @ k.mT).softmax(dim=-1)
    rows = middle.abs().sum(-1).amax(-1) * middle.abs().sum(-2).amax(-1)
    inverse, eye = middle.mT / rows[:, None, None], torch.eye(layer.num_landmarks)
    for _ in range(layer.pinv_iterations):
        product = middle @ inverse
        inner = 15 * eye - product @ (7 * eye - product)
        inverse = 0.25 * inverse @ (13 * eye - product @ inner)
    out = (first @ inverse) @ (last @ v) + layer.values_conv(v[None])[0]
    return dense(layer.to_out, out.transpose(0, 1).flatten(1))[padding:]


def plain_transmil(model: Any, bag: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """TransMIL."""
    hidden = torch.relu(dense(model.embed[0], bag))
    side = math.ceil(math.sqrt(len(bag)))
    tokens = torch.cat([model.class_token, hidden, hidden[: side * side - len(bag)]])
    tokens = tokens + plain_nystrom(model.layers[0], model.norms[0](tokens))
    square = tokens[1:].T.reshape(1, -1, side, side)
    encoded = square + sum(convolution(square) for convolution in model.position.convolutions)
    tokens = torch.cat([tokens[:1], encoded[0].flatten(1).T])
    tokens = tokens + plain_nystrom(model.layers[1], model.norms[1](tokens))
    logits = model.classifier(model.norm(tokens)[0])
    return logits, cross_entropy(logits, label)


def plain_unicas(model: Any, bag: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """UniCAS with keys, values and masked patch tokens written out."""
    tasks = len(model.task_classes)
    x = torch.cat([model.task_tokens, model.embed(bag)])
    for block, attention in enumerate(model.attentions):
        normed = model.attention_norms[block](x)
        patches = normed[tasks:]
        keys, values = attention.key(patches), attention.value(patches)
        tokens, summed = [], torch.zeros_like(patches)
        for task in range(tasks):
            scores = keys @ attention.query(normed[task]) / math.sqrt(normed.shape[1])
            kept = scores >= scores.topk(min(attention.top_m, len(scores))).values[-1]
            weights = scores.masked_fill(~kept, -torch.inf).softmax(dim=0)
            tokens.append(attention.project[task](weights @ values))
            summed = summed + dense(attention.project[task], patches * kept[:, None])
        x = x + torch.cat([torch.stack(tokens), summed])
        moe, normed = model.moes[block], model.moe_norms[block](x)
        routing = normed @ moe.slots
        slots = routing.softmax(dim=0).T @ normed
        hidden = F.gelu(slots[:, None] @ moe.up + moe.up_bias)
        experts = (hidden @ moe.down + moe.down_bias)[:, 0]
        x = x + routing.softmax(dim=1) @ experts
    normed = model.norm(x[:tasks])
    logits = [head(normed[task]) for task, head in enumerate(model.heads)]
    columns = label.reshape(-1)
    losses = [cross_entropy(part, columns[task]) for task, part in enumerate(logits)]
    return torch.cat(logits), torch.stack(losses).mean()


def one_bag(model: Aggregator, bag: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The package's own aggregator on a single bag."""
    output = model(*pack([bag]))
    return torch.cat(output.task_logits, dim=1)[0], sum_of(model.loss(output, label[None]))


def sum_of(terms: dict[str, Tensor]) -> Tensor:
    """The training loss."""
    return torch.stack(list(terms.values())).sum()


PLAIN: dict[str, Plain] = {
    "mean": plain_mean,
    "max": plain_max,
    "abmil": plain_abmil,
    "clam": plain_clam,
    "clam_mb": plain_clam,
    "transmil": plain_transmil,
    "dsmil": plain_dsmil,
    "dtfd": plain_dtfd,
    "unicas": plain_unicas,
    "less": one_bag,
}
