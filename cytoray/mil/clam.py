"""CLAM (Lu et al. 2021): gated attention pooling, with an instance clustering branch.

Shapes: B bags, T instances of all bags together, H hidden width, C classes, K attention branches
(1 in CLAM-SB, C in CLAM-MB), E the two ends of a bag, P instances of an end.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytoray.errors import choose
from cytoray.mil.abmil import AttentionScorer, attention_pool
from cytoray.mil.base import Aggregator, ClassWeight, MILOutput, task_cross_entropy
from cytoray.mil.dropout import Dropout
from cytoray.models.linear import Linear


def smooth_top1_svm(logits: Tensor, targets: Tensor) -> Tensor:
    """Smooth top-1 SVM loss (Berrada et al. 2018), margin and temperature 1: (N, C) to (N,)."""
    margins = 1.0 - F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    true_score = logits.gather(1, targets[:, None])
    return torch.logsumexp(logits + margins - true_score, dim=1)


INSTANCE_LOSSES = {"ce": partial(F.cross_entropy, reduction="none"), "svm": smooth_top1_svm}


def pick_ends(scores_tk: Tensor, offsets: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The most and the least attended instances of each bag and attention branch.

    Args:
        scores_tk: (T, K) attention scores.
        offsets: (B + 1,) int64.
        limit: instances of an end; fewer in a bag too small for two ends without overlap.

    Returns:
        Rows into T (B, K, 2, limit) int64, the highest end first, filled up with the bag's first
        instance; and how many of an end count (B,) int64.
    """
    ends, counts = [], []
    for start, stop in pairwise(offsets.tolist()):
        k = min(limit, (stop - start) // 2)
        scores_kn = scores_tk[start:stop].T
        both = [scores_kn.topk(k, largest=largest).indices for largest in (True, False)]
        ends.append(F.pad(torch.stack(both, dim=1), (0, limit - k)) + start)
        counts.append(k)
    return torch.stack(ends), torch.tensor(counts, device=offsets.device)


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

    multi_task = False
    optimizer_defaults: ClassVar = {"lr": 1e-4, "weight_decay": 1e-5}
    cpu_instances: ClassVar = 4096
    num_branches = 1

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
        branches = self.num_branches or self.num_classes
        self.embed = nn.Sequential(Linear(in_dim, hidden_dim, relu=True), Dropout(dropout))
        self.attention = AttentionScorer(hidden_dim, attention_dim, dropout=dropout, heads=branches)
        self.classifier = nn.Linear(hidden_dim, self.num_classes)
        self.instance_classifiers = nn.ModuleList(
            nn.Linear(hidden_dim, 2) for _ in range(self.num_classes)
        )

    def aggregate(self, features: Tensor, offsets: Tensor, ids: Tensor) -> MILOutput:
        """See `Aggregator.aggregate`."""
        hidden_th = self.embed(features)
        scores_tk = self.attention(hidden_th)
        pooled_bkh, attention_tk = attention_pool(hidden_th, scores_tk, offsets, ids)
        logits_bc = (pooled_bkh * self.classifier.weight).sum(dim=2) + self.classifier.bias
        attention_tk = attention_tk.detach()
        rows_bkep, counts = pick_ends(scores_tk.detach(), offsets, self.num_picked)
        aux = {"picked": hidden_th[rows_bkep], "num_picked": counts}
        branch = logits_bc.argmax(dim=1) * (attention_tk.shape[1] > 1)
        attention_t = attention_tk.gather(1, branch[ids][:, None])[:, 0]
        return MILOutput(logits_bc, attention_t, aux)

    def loss(
        self, output: MILOutput, labels: Tensor, class_weight: ClassWeight = None
    ) -> dict[str, Tensor]:
        """Bag cross-entropy and the instance term, weighted `bag_weight` to `1 - bag_weight`."""
        bag = task_cross_entropy(output.task_logits, labels, class_weight)
        instance = self._instance_term(output.aux, labels.flatten())
        return {"bag": self.bag_weight * bag, "instance": (1.0 - self.bag_weight) * instance}

    def _instance_term(self, aux: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Mean over the labelled bags of their instance losses."""
        picked_bkeph, counts = aux["picked"], aux["num_picked"]
        place = torch.arange(self.num_picked, device=counts.device)
        shares_bp = (place < counts[:, None]) / counts.clamp(min=1)[:, None]
        total = picked_bkeph.new_zeros(())
        for branch, classifier in enumerate(self.instance_classifiers):
            column = branch if picked_bkeph.shape[1] > 1 else 0
            own = labels == branch
            parts = [(own, 0, 1, 0.5), (own, 1, 0, 0.5)]
            if self.subtyping:
                parts.append(((labels >= 0) & ~own, 0, 0, 1.0))
            for bags, end, target, weight in parts:
                logits = classifier(picked_bkeph[bags, column, end].flatten(0, 1)).float()
                targets = torch.full((len(logits),), target, device=logits.device)
                losses = self.instance_loss(logits, targets)
                total = total + weight * (shares_bp[bags].flatten() * losses).sum()
        known = (labels >= 0).sum().clamp(min=1)
        return total / known / (self.num_classes if self.subtyping else 1)


class CLAMMB(CLAM):
    """CLAM with one attention branch a class (CLAM-MB); see `CLAM` for the arguments.

    Each class has its own attention, pools its own bag feature and picks its own instances.
    `MILOutput.attention` is the predicted class's.
    """

    num_branches = 0
