"""CLAM-SB (Lu et al. 2021): gated attention pooling, with an instance clustering branch.

Shapes: B bags, T instances of all bags together, H hidden width, C classes, k instances picked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytoray.errors import choose
from cytoray.mil.abmil import AttentionScorer, attention_pool
from cytoray.mil.base import Aggregator, MILOutput
from cytoray.mil.packing import split_bags


def smooth_top1_svm(logits: Tensor, targets: Tensor) -> Tensor:
    """Smooth top-1 SVM loss (Berrada et al. 2018) with margin and temperature 1: a scalar."""
    margins = 1.0 - F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    true_score = logits.gather(1, targets[:, None])
    return torch.logsumexp(logits + margins - true_score, dim=1).mean()


INSTANCE_LOSSES = {"ce": F.cross_entropy, "svm": smooth_top1_svm}


class CLAM(Aggregator):
    """CLAM with a single attention branch.

    The instance branch of the true class learns that the k most attended instances are positive
    and the k least attended negative. k is `num_picked`, or half of a bag that is too small for
    2k different instances (the published code needs at least k and then labels some instances
    both ways); a bag of one has no instance term.

    Args:
        in_dim: width D of the instance features.
        num_classes: C.
        hidden_dim: H.
        attention_dim: width of the attention branches.
        dropout: on the hidden features and in the attention branches.
        num_picked: k.
        bag_weight: share of the bag loss; the instance loss has the rest.
        subtyping: classes exclude one another: the most attended instances are also shown to the
            other classes' branches as negatives, and the sum is divided by C.
        instance_loss: `ce`, or `svm` for the smooth top-1 SVM.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        *,
        hidden_dim: int = 512,
        attention_dim: int = 256,
        dropout: float = 0.25,
        num_picked: int = 8,
        bag_weight: float = 0.7,
        subtyping: bool = False,
        instance_loss: str = "ce",
    ) -> None:
        super().__init__(in_dim, num_classes)
        self.num_picked, self.bag_weight, self.subtyping = num_picked, bag_weight, subtyping
        self.instance_loss = INSTANCE_LOSSES[
            choose("instance loss", instance_loss, INSTANCE_LOSSES)
        ]
        self.embed = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout))
        self.attention = AttentionScorer(hidden_dim, attention_dim, dropout=dropout)
        self.classifier = nn.Linear(hidden_dim, num_classes)
        self.instance_classifiers = nn.ModuleList(
            nn.Linear(hidden_dim, 2) for _ in range(num_classes)
        )

    def aggregate(self, features: Tensor, offsets: Tensor, ids: Tensor) -> MILOutput:
        """See `Aggregator.aggregate`."""
        hidden_th = self.embed(features)
        scores_t = self.attention(hidden_th)[:, 0]
        pooled_bh, attention_t = attention_pool(hidden_th, scores_t, ids, offsets.shape[0] - 1)
        aux = {"hidden": hidden_th, "offsets": offsets, "scores": scores_t.detach()}
        return MILOutput(self.classifier(pooled_bh), attention_t.detach(), aux)

    def loss(
        self, output: MILOutput, labels: Tensor, class_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Bag cross-entropy and the instance term, weighted `bag_weight` to `1 - bag_weight`."""
        bag = F.cross_entropy(output.logits.float(), labels, class_weight)
        hidden = split_bags(output.aux["hidden"], output.aux["offsets"])
        scores = split_bags(output.aux["scores"], output.aux["offsets"])
        terms = [
            self._instance_term(hidden_nh, scores_n, int(label))
            for hidden_nh, scores_n, label in zip(hidden, scores, labels.tolist(), strict=True)
        ]
        instance = torch.stack(terms).mean()
        return {"bag": self.bag_weight * bag, "instance": (1.0 - self.bag_weight) * instance}

    def _instance_term(self, hidden_nh: Tensor, scores_n: Tensor, label: int) -> Tensor:
        k = min(self.num_picked, scores_n.shape[0] // 2)
        if k == 0:
            return hidden_nh.new_zeros(())
        top_kh = hidden_nh[scores_n.topk(k).indices]
        bottom_kh = hidden_nh[scores_n.topk(k, largest=False).indices]
        targets = torch.tensor([1] * k + [0] * k, device=hidden_nh.device)
        logits = self.instance_classifiers[label](torch.cat([top_kh, bottom_kh]))
        total = self.instance_loss(logits.float(), targets)
        if not self.subtyping:
            return total
        for other, classifier in enumerate(self.instance_classifiers):
            if other != label:
                total = total + self.instance_loss(classifier(top_kh).float(), targets[k:])
        return total / self.num_classes
