"""Self-distillation of a ViT by an EMA teacher: the parts DINO, iBOT and DINOv2 are made of.

Shapes: b tiles of a micro-batch, G global crops, L local crops, D width, K prototypes, M masked
patches of a micro-batch. Crops are numbered tile by tile: crop = tile * G + view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from cytoray.models.backbones import Backbone, CropGroup
from cytoray.models.drop_path import DropRows
from cytoray.models.transfer import to_device
from cytoray.ssl.base import Method, MicroBatch
from cytoray.ssl.batch_norm import as_momentum_network
from cytoray.ssl.choices import Ahead, ChoiceRules, StepShape
from cytoray.ssl.collectives import all_sum, gather_rows
from cytoray.ssl.dino_network import DINONetwork, LossSettings
from cytoray.ssl.losses import KoleoLoss, build_targets, dino_loss, ibot_loss, koleo_loss
from cytoray.ssl.losses.lazy_targets import LazyTargets
from cytoray.ssl.masks import MaskedPatches
from cytoray.ssl.monitor import effective_rank, entropy, feature_std
from cytoray.ssl.moving_average import MovingAverage, momentum_copy


@dataclass(frozen=True)
class _Masked:
    mask: Tensor  # bool (b*G, N)
    index: Tensor  # int64 (M,)
    weight: Tensor  # float32 (M,)

    @staticmethod
    def of(made: MaskedPatches, device: torch.device) -> _Masked:
        return _Masked(*(to_device(x, device) for x in (made.mask, made.index, made.weight)))


@dataclass(frozen=True)
class _Targets:
    cls: Tensor  # float32 (b, G, K)
    patches: Tensor | LazyTargets | None  # float32 (M, K)
    features: Tensor  # float (b, G, D)


@dataclass(frozen=True)
class _Koleo:
    """KoLeo of the global batch, and its slope at the class tokens of a micro-batch."""

    value: Tensor
    slope: Tensor  # float32 (b, G, D)


@dataclass(frozen=True)
class _Known:
    masked: _Masked | None
    drop: list[DropRows | None]
    targets: _Targets
    koleo: _Koleo | None  # None where the micro-batch is the whole share


class SelfDistillation(Method):
    """Student and EMA teacher with DINO, iBOT and KoLeo losses.

    Args:
        network: the student; the teacher starts as its copy.
        out_dim: prototypes K of the heads.
        settings: losses and masks; an `ibot_weight` of 0 makes no masks.
        drop_path: share of rows that the student's residual branches skip.
        seed: of masks and drop path.

    Attributes:
        compile_backend: compile the losses with this backend of `torch.compile`; None: do not.
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
        self.teacher = momentum_copy(network)
        self.settings = settings
        self.entropy_bound = math.log(out_dim)
        self.compile_backend: str | None = None
        rules = ChoiceRules(
            seed=seed,
            depth=network.backbone.depth,
            drop_path=drop_path,
            masks=settings.masks if settings.ibot_weight else None,
        )
        self.choices = Ahead(rules)
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
        as_momentum_network(self.teacher)
        return self

    def begin(self, batches: Sequence[MicroBatch], scale: float) -> list[_Known]:
        shape = StepShape.of(batches, self.student.backbone.patch_px)
        chosen = self.choices(batches[0].context.step, shape)
        device = batches[0].crops.global_crops.device
        masked = [None if c.masked is None else _Masked.of(c.masked, device) for c in chosen]
        drop = [c.drop_rows(device) for c in chosen]
        targets = self._targets(batches, masked)
        koleo: Sequence[_Koleo | None] = [None] * len(batches)
        if len(batches) > 1 and self.settings.koleo_weight:
            koleo = self._koleo(batches, masked, drop)
        return [_Known(*each) for each in zip(masked, drop, targets, koleo, strict=True)]

    @torch.no_grad()
    def _targets(
        self, batches: Sequence[MicroBatch], masked: Sequence[_Masked | None]
    ) -> list[_Targets]:
        """Targets of all micro-batches together: Sinkhorn and the centre are over all rows."""
        cls, patches = [], []
        for batch, hidden in zip(batches, masked, strict=True):
            images = batch.crops.global_crops.flatten(0, 1)
            wanted = _no_patches(images) if hidden is None else hidden.index
            (tokens,) = self.teacher.backbone.encode([CropGroup(images, patches=wanted)])
            cls.append(tokens.cls)
            if hidden is not None:
                patches.append(tokens.patches)
        (logits,), patch_logits = self.teacher.project(
            [torch.cat(cls)], torch.cat(patches) if patches else None
        )
        views = batches[0].crops.global_crops.shape[1]
        with torch.autocast(logits.device.type, enabled=False):
            context, patch_temp_at = batches[0].context, self.settings.patch_teacher_temp
            aims = self.cls_targets(logits, temp=context.teacher_temp, overwrite=True)
            aims = aims.split([len(x) for x in cls])
            patch_aims: Sequence[Tensor | LazyTargets | None] = [None] * len(batches)
            if patch_logits is not None:
                temp = patch_temp_at(context.step) if patch_temp_at else context.teacher_temp
                whole = self.patch_targets(patch_logits, temp=temp, overwrite=True, lazy=True)
                patch_aims = whole.split([len(x) for x in patches])
        return [
            _Targets(aim.unflatten(0, (-1, views)), patch_aim, x.unflatten(0, (-1, views)))
            for aim, patch_aim, x in zip(aims, patch_aims, cls, strict=True)
        ]

    def _koleo(
        self,
        batches: Sequence[MicroBatch],
        masked: Sequence[_Masked | None],
        drop: Sequence[list[DropRows | None]],
    ) -> list[_Koleo]:
        """The nearest neighbour may be in another micro-batch: a pass of its own, without graph."""
        with torch.no_grad():
            cls = [
                self.student.backbone.encode([_global_crops(batch, hidden, rows)])[0].cls
                for batch, hidden, rows in zip(batches, masked, drop, strict=True)
            ]
        views = batches[0].crops.global_crops.shape[1]
        features = torch.cat(cls).float().unflatten(0, (-1, views)).requires_grad_()
        context = batches[0].context
        with torch.autocast(features.device.type, enabled=False):
            value = koleo_loss(features, global_batch=context.global_batch, offset=context.offset)
        (slope,) = torch.autograd.grad(value, features)
        parts = slope.split([len(x) // views for x in cls])
        return [_Koleo(value.detach(), part) for part in parts]

    def forward(self, batch: MicroBatch, known: _Known) -> tuple[Tensor, dict[str, Tensor]]:
        crops, masked = batch.crops, known.masked
        tiles, views = crops.global_crops.shape[:2]
        groups = [_global_crops(batch, masked, known.drop)]
        if crops.local_crops is not None:
            local = crops.local_crops.flatten(0, 1)
            groups.append(CropGroup(local, drop=known.drop[1], patches=_no_patches(local)))
        tokens = self.student.backbone.encode(groups)
        cls = tokens[0].cls.unflatten(0, (tiles, views))
        spread = None
        if known.koleo is None and self.settings.koleo_weight:
            total, offset = batch.context.global_batch, batch.context.offset
            # The ranks exchange class tokens while the heads and the other losses are computed.
            spread = KoleoLoss(cls, global_batch=total, offset=offset)
        chosen = None if masked is None else tokens[0].patches
        logits, patch_logits = self.student.project([part.cls for part in tokens], chosen)
        with torch.autocast(crops.global_crops.device.type, enabled=False):
            local_logits = logits[1].unflatten(0, (tiles, -1)) if logits[1:] else None
            parts = self._losses(
                logits[0].unflatten(0, (tiles, views)),
                local_logits,
                patch_logits,
                cls,
                spread,
                known,
                batch,
            )
        s = self.settings
        loss = s.dino_weight * parts["dino"] + s.koleo_weight * parts["koleo"]
        loss = loss + s.ibot_weight * parts["ibot"]
        return loss, {name: part.detach() for name, part in parts.items()}

    def _losses(
        self,
        global_logits: Tensor,
        local_logits: Tensor | None,
        patch_logits: Tensor | None,
        cls: Tensor,
        spread: KoleoLoss | None,
        known: _Known,
        batch: MicroBatch,
    ) -> dict[str, Tensor]:
        s, targets = self.settings, known.targets
        total = batch.context.global_batch
        zero = cls.new_zeros((), dtype=torch.float32)
        parts = {"dino": zero, "ibot": zero, "koleo": zero}
        parts["dino"] = dino_loss(
            global_logits,
            local_logits,
            targets.cls,
            student_temp=s.student_temp,
            global_batch=total,
            overwrite=True,
            compile_backend=self.compile_backend,
        )
        if known.masked is not None and patch_logits is not None and targets.patches is not None:
            parts["ibot"] = ibot_loss(
                patch_logits,
                targets.patches,
                known.masked.weight,
                student_temp=s.student_temp,
                global_crops=total * cls.shape[1],
                overwrite=True,
                compile_backend=self.compile_backend,
            )
        if known.koleo is not None:
            parts["koleo"] = (cls.float() * known.koleo.slope).sum()  # has KoLeo's gradient
        elif spread is not None:
            parts["koleo"] = spread.value()
        return parts

    @torch.no_grad()
    def metrics(
        self,
        batches: Sequence[MicroBatch],
        known: Sequence[_Known],
        values: Sequence[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        s, context = self.settings, batches[0].context
        total = context.global_batch
        cls = _joined([part.targets.cls for part in known])
        crops = total * cls.shape[1]
        flat = cls.flatten(0, 1)
        dino, ibot, koleo = (
            torch.stack([part[name] for part in values]).sum() for name in ("dino", "ibot", "koleo")
        )
        sums = torch.stack([dino, ibot, entropy(flat).sum() / crops])
        reduced = all_sum(torch.cat([sums, flat.sum(0) / crops]))
        dino, ibot, row_entropy = reduced[:3].unbind()
        if known[0].koleo is not None:
            koleo = known[0].koleo.value
        first = _joined([part.targets.features[:, 0].float() for part in known])
        features = gather_rows(first, total=total, offset=context.offset)
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

    def after_step(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student."""
        self._average.follow(momentum)

    @cached_property
    def _average(self) -> MovingAverage:
        return MovingAverage((self.teacher, self.student))

    def encoder(self) -> Backbone:
        """The teacher's backbone."""
        return self.teacher.backbone


def _global_crops(
    batch: MicroBatch, masked: _Masked | None, drop: Sequence[DropRows | None]
) -> CropGroup:
    """What the student's backbone is given of the global crops."""
    images = batch.crops.global_crops.flatten(0, 1)
    if masked is None:
        return CropGroup(images, drop=drop[0], patches=_no_patches(images))
    return CropGroup(images, masked.mask, drop[0], masked.index)


def _no_patches(images: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=images.device)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """All rows; without a copy when there is one part only."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
