"""DTFD-MIL (Zhang et al. 2022): pseudo-bags, then a second tier on what they distil.

Shapes: B bags, T instances of all bags together, P pseudo-bags of all bags together, H hidden
width, R distilled features of all bags together, C classes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytoray.errors import choose
from cytoray.mil.abmil import AttentionScorer
from cytoray.mil.base import Aggregator, ClassWeight, MILOutput, task_cross_entropy
from cytoray.mil.packing import segment_argmax, segment_softmax, segment_sum, weighted_sums
from cytoray.models.linear import Linear

DISTILLATIONS = ("afs", "max", "maxmin")


def deal_pseudo_bags(offsets: Tensor, count: int, *, shuffle_seed: int | None) -> Tensor:
    """Assign every instance to a pseudo-bag of its bag: (T,) int64 in 0..P-1, bag by bag.

    Each bag is shuffled and dealt into `count` parts of nearly equal size; a bag of fewer than
    `count` instances makes one pseudo-bag of each.

    Args:
        offsets: (B + 1,) int64.
        count: pseudo-bags of a bag.
        shuffle_seed: None draws from the global generator (training); with a seed, a bag is dealt
            the same way every time and whatever its neighbours.
    """
    pseudo, first = [], 0
    for size in offsets.diff().tolist():
        parts = min(count, size)
        generator = None
        if shuffle_seed is not None:
            generator = torch.Generator().manual_seed(shuffle_seed)
        order = torch.randperm(size, generator=generator)
        part = torch.empty(size, dtype=torch.int64)
        part[order] = torch.arange(size) * parts // size
        pseudo.append(part + first)
        first += parts
    return torch.cat(pseudo).to(offsets.device)


class DTFD(Aggregator):
    """Double-tier feature distillation.

    Tier 1 classifies pseudo-bags; tier 2 classifies the bag from the features distilled out of
    them, and sends no gradient into tier 1. Instances are ranked by the class activation map of
    tier 1: by 1 - P(class 0), which for two classes is the published P(class 1). Instance
    attention is tier 1's within the pseudo-bag times tier 2's share of that pseudo-bag.

    Args:
        in_dim: width D of the instance features.
        num_classes: C.
        hidden_dim: H.
        attention_dim: width of the attention branches.
        num_pseudo_bags: pseudo-bags of a bag, dealt anew at every training step.
        distillation: `afs` the pooled feature of a pseudo-bag, `max` its highest instance,
            `maxmin` its highest and its lowest.
        dropout: on the features that each tier's classifier sees.
    """

    multi_task = False
    optimizer_defaults: ClassVar = {"lr": 1e-4, "weight_decay": 1e-4, "clip_grad": 5.0}
    cpu_instances: ClassVar = 4096

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        *,
        hidden_dim: int = 512,
        attention_dim: int = 128,
        num_pseudo_bags: int = 4,
        distillation: str = "afs",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_dim, num_classes)
        self.num_pseudo_bags = num_pseudo_bags
        self.distillation = choose("distillation", distillation, DISTILLATIONS)
        self.embed = nn.Sequential(Linear(in_dim, hidden_dim, bias=False, relu=True))
        self.dropout = nn.Dropout(dropout)
        self.attention = AttentionScorer(hidden_dim, attention_dim)
        self.pseudo_classifier = nn.Linear(hidden_dim, num_classes)
        self.tier2_attention = AttentionScorer(hidden_dim, attention_dim)
        self.classifier = nn.Linear(hidden_dim, num_classes)

    def aggregate(self, features: Tensor, offsets: Tensor, ids: Tensor) -> MILOutput:
        """See `Aggregator.aggregate`."""
        seed = None if self.training else 0
        pseudo_t = deal_pseudo_bags(offsets, self.num_pseudo_bags, shuffle_seed=seed)
        bag_of_pseudo = segment_bag(pseudo_t, ids)
        num_pseudo, num_bags = bag_of_pseudo.shape[0], offsets.shape[0] - 1
        hidden_th = self.embed(features)
        attention_t = segment_softmax(self.attention(hidden_th)[:, 0], pseudo_t, num_pseudo)
        pooled_ph = self._pool_pseudo(hidden_th, attention_t, pseudo_t, bag_of_pseudo, offsets)
        pseudo_logits = self.pseudo_classifier(self.dropout(pooled_ph))
        distilled_rh, pseudo_r = self._distil(hidden_th, attention_t, pooled_ph, pseudo_t)
        tier2_scores = self.tier2_attention(distilled_rh)[:, 0]
        bag_of_distilled = bag_of_pseudo[pseudo_r]
        share_r = segment_softmax(tier2_scores, bag_of_distilled, num_bags)
        shared_rh = share_r.to(distilled_rh.dtype)[:, None] * distilled_rh
        bag_bh = segment_sum(shared_rh, bag_of_distilled, num_bags)
        share_p = share_r.new_zeros(num_pseudo).index_add(0, pseudo_r, share_r)
        aux = {"pseudo_logits": pseudo_logits, "num_pseudo": torch.bincount(bag_of_pseudo)}
        attention = (attention_t * share_p[pseudo_t]).detach()
        return MILOutput(self.classifier(self.dropout(bag_bh)), attention, aux)

    def _pool_pseudo(
        self,
        hidden_th: Tensor,
        attention_t: Tensor,
        pseudo_t: Tensor,
        bag_of_pseudo: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        """Pooled feature of each pseudo-bag (P, H): one weighting of the bag for each of them."""
        num_pseudo, num_bags = bag_of_pseudo.shape[0], offsets.shape[0] - 1
        first = torch.searchsorted(bag_of_pseudo, torch.arange(num_bags, device=offsets.device))
        place_p = torch.arange(num_pseudo, device=offsets.device) - first[bag_of_pseudo]
        places = F.one_hot(place_p[pseudo_t], self.num_pseudo_bags).to(attention_t.dtype)
        pooled_bph = weighted_sums(attention_t[:, None] * places, hidden_th, offsets)
        return pooled_bph[bag_of_pseudo, place_p]

    def _distil(
        self, hidden_th: Tensor, attention_t: Tensor, pooled_ph: Tensor, pseudo_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Distilled features (R, H), cut from the graph, and the pseudo-bag each came from."""
        num_pseudo = pooled_ph.shape[0]
        every = torch.arange(num_pseudo, device=pooled_ph.device)
        if self.distillation == "afs":
            return pooled_ph.detach(), every
        with torch.no_grad():
            activation_tc = F.linear(hidden_th, self.pseudo_classifier.weight)
            activation_tc = (attention_t[:, None] * activation_tc).softmax(dim=1)
            abnormal_t1 = 1.0 - activation_tc[:, :1]
            highest = segment_argmax(abnormal_t1, pseudo_t, num_pseudo)[:, 0]
            if self.distillation == "max":
                return hidden_th[highest].detach(), every
            lowest = segment_argmax(-abnormal_t1, pseudo_t, num_pseudo)[:, 0]
            picked = torch.cat([highest, lowest])
            return hidden_th[picked].detach(), torch.cat([every, every])

    def loss(
        self, output: MILOutput, labels: Tensor, class_weight: ClassWeight = None
    ) -> dict[str, Tensor]:
        """Cross-entropy of the bag (tier 2) and of every pseudo-bag under its bag's label."""
        pseudo_labels = labels.flatten().repeat_interleave(output.aux["num_pseudo"])
        pseudo_logits = (output.aux["pseudo_logits"],)
        return {
            "bag": task_cross_entropy(output.task_logits, labels, class_weight),
            "pseudo_bag": task_cross_entropy(pseudo_logits, pseudo_labels, class_weight),
        }


def segment_bag(pseudo_t: Tensor, ids: Tensor) -> Tensor:
    """The bag of each pseudo-bag: (P,) int64."""
    bag_of_pseudo = ids.new_zeros(int(pseudo_t.max()) + 1)
    bag_of_pseudo[pseudo_t] = ids
    return bag_of_pseudo
