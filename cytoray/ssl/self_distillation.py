"""Self-distillation of a ViT by an EMA teacher: the parts DINO, iBOT and DINOv2 are made of.

Shapes: b tiles of this rank, G global crops, L local crops, D width, K prototypes, M masked patches
of this rank. Crops are numbered tile by tile: crop = tile * G + view.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cytoray.models.backbones import ViTBackbone
from cytoray.models.drop_path import make_drop_rows
from cytoray.models.heads import DINOHead
from cytoray.models.transfer import to_device
from cytoray.ssl.base import Crops, Method, StepContext
from cytoray.ssl.collectives import all_sum, gather_rows
from cytoray.ssl.losses import build_targets, dino_loss, ibot_loss, koleo_loss
from cytoray.ssl.masks import MaskPolicy, make_block_masks
from cytoray.ssl.monitor import effective_rank, entropy, feature_std


@dataclass(frozen=True)
class _Masked:
    mask: Tensor  # bool (b*G, N)
    index: Tensor  # int64 (M,)
    weight: Tensor  # float32 (M,)


@dataclass(frozen=True)
class _Targets:
    cls: Tensor  # float32 (b, G, K)
    patches: Tensor | None  # float32 (M, K)
    features: Tensor  # float (b, G, D)


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Weights, temperatures and masks of the three losses."""

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temp: float = 0.1
    centering: str = "sinkhorn"
    centre_momentum: float = 0.9
    masks: MaskPolicy = field(default_factory=MaskPolicy)


class DINONetwork(nn.Module):
    """Backbone and heads of the student or the teacher; `patch_head` None: shared with `cls`."""

    def __init__(
        self, backbone: ViTBackbone, cls_head: DINOHead, patch_head: DINOHead | None
    ) -> None:
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


class SelfDistillation(Method):
    """Student and EMA teacher with DINO, iBOT and KoLeo losses.

    Args:
        network: the student; the teacher starts as its copy.
        out_dim: prototypes K of the heads.
        settings: losses and masks; an `ibot_weight` of 0 makes no masks.
        drop_path: share of rows that the student's residual branches skip.
        seed: of masks and drop path.
    """

    student: DINONetwork
    teacher: DINONetwork

    def __init__(
        self,
        network: DINONetwork,
        *,
        out_dim: int,
        settings: LossSettings,
        drop_path: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student = network
        self.teacher = copy.deepcopy(network).requires_grad_(False).eval()
        self.settings = settings
        self.drop_path = drop_path
        self.seed = seed
        self.entropy_bound = math.log(out_dim)
        targets = [
            build_targets(settings.centering, out_dim, centre_momentum=settings.centre_momentum)
            for _ in range(2)
        ]
        self.cls_targets, self.patch_targets = targets
        if settings.ibot_weight == 0:
            network.backbone.mask_token.requires_grad_(False)

    def train(self, mode: bool = True) -> SelfDistillation:
        """As `nn.Module.train`, but the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, crops: Crops, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        views = crops.global_crops.shape[1]
        images = crops.global_crops.flatten(0, 1)
        masked = self._masks(crops, context) if self.settings.ibot_weight else None
        targets = self._targets(images, masked, views, context)
        parts = self._student_parts(crops, images, masked, targets, context)
        s = self.settings
        loss = s.dino_weight * parts["dino"] + s.koleo_weight * parts["koleo"]
        loss = loss + s.ibot_weight * parts["ibot"]
        return loss, self._metrics(parts, targets, context)

    def _masks(self, crops: Crops, context: StepContext) -> _Masked:
        tiles, views, _, height, width = crops.global_crops.shape
        patch_px = self.student.backbone.patch_px
        made = make_block_masks(
            self.seed,
            context.step,
            num_crops=context.global_batch * views,
            start=context.offset * views,
            stop=(context.offset + tiles) * views,
            grid=(height // patch_px, width // patch_px),
            policy=self.settings.masks,
        )
        device = crops.global_crops.device
        arrays = (made.mask, made.index, made.weight)
        return _Masked(*(to_device(array, device) for array in arrays))

    @torch.no_grad()
    def _targets(
        self, images: Tensor, masked: _Masked | None, views: int, context: StepContext
    ) -> _Targets:
        tokens = self.teacher.backbone(images)
        chosen = None
        if masked is not None:
            chosen = tokens.patches.flatten(0, 1).index_select(0, masked.index)
        (cls,), patches = self.teacher.project([tokens.cls], chosen)
        with torch.autocast(images.device.type, enabled=False):
            temp = context.teacher_temp
            cls = self.cls_targets(cls, temp=temp)
            if patches is not None:
                patches = self.patch_targets(patches, temp=temp)
        return _Targets(
            cls.unflatten(0, (-1, views)), patches, tokens.cls.unflatten(0, (-1, views))
        )

    def _student_parts(
        self,
        crops: Crops,
        images: Tensor,
        masked: _Masked | None,
        targets: _Targets,
        context: StepContext,
    ) -> dict[str, Tensor]:
        tiles, views = crops.global_crops.shape[:2]
        mask = None if masked is None else masked.mask
        tokens = self.student.backbone(images, mask, self._drop(0, views, tiles, images, context))
        cls = [tokens.cls]
        if crops.local_crops is not None:
            local = crops.local_crops.flatten(0, 1)
            drop = self._drop(1, crops.local_crops.shape[1], tiles, local, context)
            cls.append(self.student.backbone(local, None, drop).cls)
        chosen = None
        if masked is not None:
            chosen = tokens.patches.flatten(0, 1).index_select(0, masked.index)
        logits, patch_logits = self.student.project(cls, chosen)
        with torch.autocast(images.device.type, enabled=False):
            local_logits = logits[1].unflatten(0, (tiles, -1)) if logits[1:] else None
            return self._losses(
                logits[0].unflatten(0, (tiles, views)),
                local_logits,
                patch_logits,
                tokens.cls.unflatten(0, (tiles, views)),
                masked,
                targets,
                context,
            )

    def _losses(
        self,
        global_logits: Tensor,
        local_logits: Tensor | None,
        patch_logits: Tensor | None,
        cls: Tensor,
        masked: _Masked | None,
        targets: _Targets,
        context: StepContext,
    ) -> dict[str, Tensor]:
        s, total = self.settings, context.global_batch
        zero = cls.new_zeros((), dtype=torch.float32)
        parts = {"dino": zero, "ibot": zero, "koleo": zero}
        parts["dino"] = dino_loss(
            global_logits,
            local_logits,
            targets.cls,
            student_temp=s.student_temp,
            global_batch=total,
        )
        if masked is not None and patch_logits is not None and targets.patches is not None:
            parts["ibot"] = ibot_loss(
                patch_logits,
                targets.patches,
                masked.weight,
                student_temp=s.student_temp,
                global_crops=total * cls.shape[1],
            )
        if s.koleo_weight:
            parts["koleo"] = koleo_loss(cls, global_batch=total, offset=context.offset)
        return parts

    def _drop(self, group: int, views: int, tiles: int, images: Tensor, context: StepContext):
        return make_drop_rows(
            self.seed,
            context.step,
            group=group,
            depth=self.student.backbone.depth,
            total=context.global_batch * views,
            start=context.offset * views,
            stop=(context.offset + tiles) * views,
            rate=self.drop_path if self.training else 0.0,
            device=images.device,
        )

    @torch.no_grad()
    def _metrics(
        self, parts: dict[str, Tensor], targets: _Targets, context: StepContext
    ) -> dict[str, Tensor]:
        s, total = self.settings, context.global_batch
        crops = total * targets.cls.shape[1]
        flat = targets.cls.flatten(0, 1)
        sums = torch.stack([parts["dino"], parts["ibot"], entropy(flat).sum() / crops])
        reduced = all_sum(torch.cat([sums, flat.sum(0) / crops]))
        dino, ibot, row_entropy = reduced[:3].unbind()
        koleo = parts["koleo"].detach()
        features = gather_rows(targets.features[:, 0].float(), total=total, offset=context.offset)
        return {
            "loss": s.dino_weight * dino + s.ibot_weight * ibot + s.koleo_weight * koleo,
            "loss_dino": dino,
            "loss_ibot": ibot,
            "loss_koleo": koleo,
            "teacher_entropy": row_entropy,
            "prototype_entropy": entropy(reduced[3:]),
            "entropy_bound": torch.tensor(self.entropy_bound),
            "feature_std": feature_std(features),
            "effective_rank": effective_rank(features),
        }

    def clip_modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {
            "backbone": self.student.backbone,
            "cls_head": self.student.cls_head,
        }
        if self.student.patch_head is not None:
            modules["patch_head"] = self.student.patch_head
        return modules

    @torch.no_grad()
    def after_step(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student."""
        torch._foreach_lerp_(
            list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum
        )

    def encoder(self) -> ViTBackbone:
        """The teacher's backbone."""
        return self.teacher.backbone
