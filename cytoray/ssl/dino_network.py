"""Backbone and projection heads of DINO, iBOT and DINOv2, and what their losses are weighted by.

Shapes: D width of the backbone, K prototypes, M masked patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from cytoray.models.backbones import Backbone
from cytoray.models.heads import DINOHead
from cytoray.ssl.masks import MaskPolicy


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Weights, temperatures and masks of the three losses.

    Attributes:
        patch_teacher_temp: temperature of the patches' targets by the step; None: that of the
            class tokens'.
    """

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temp: float = 0.1
    patch_teacher_temp: Callable[[int], float] | None = None
    centering: str = "sinkhorn"
    centre_momentum: float = 0.9
    masks: MaskPolicy = field(default_factory=MaskPolicy)


class DINONetwork(nn.Module):
    """Backbone and heads of the student or the teacher; `patch_head` None: shared with `cls`."""

    def __init__(self, backbone: Backbone, cls_head: DINOHead, patch_head: DINOHead | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.cls_head = cls_head
        self.patch_head = patch_head

    def project(
        self, cls: Sequence[Tensor], patches: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Logits of blocks of class tokens (n, D) and of masked patches (M, D)."""
        if patches is None:
            return self.cls_head.forward_parts(cls), None
        if self.patch_head is not None:
            return self.cls_head.forward_parts(cls), self.patch_head(patches)
        *logits, patch_logits = self.cls_head.forward_parts([*cls, patches])
        return logits, patch_logits
