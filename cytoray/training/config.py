"""What a pretraining run is: every choice of the SSL step as frozen, checked dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from cytoray.errors import InputError, raise_problems
from cytoray.models.architectures import published_normalisation, resolve_name, timm_options
from cytoray.models.backbones import LoRAChoice, backbone_facts
from cytoray.models.encoder import SPEC_FILE, EncoderSpec, read_encoder
from cytoray.models.sr_transformer import SRConfig
from cytoray.ssl.augment import IMAGENET_MEAN, IMAGENET_STD
from cytoray.ssl.losses import TARGETS
from cytoray.ssl.methods import METHODS
from cytoray.ssl.two_views import TwoViewConfig, two_view_problems
from cytoray.training.backbone_checks import backbone_problems

BackboneOption = int | float | bool | str


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The encoder under training.

    Attributes:
        name: a timm ViT with a class token (`vit_*`, `deit*`), a DINOv3 or EVA ViT
            (`vit_*_dinov3`), a ResNet (`resnet50`), or `hf-hub:OWNER/MODEL` of one.
        pretrained: start from timm's published weights.
        init_from: weights to start from (overrides `pretrained`): folder of a saved encoder,
            `.safetensors` file, or PyTorch file without code in it. Position tables are resampled.
        drop_path: share of the crops each residual branch skips (batch-subset form);
            None: 0.3 for a width of 1024 or more, 0.1 for 768 or more, else 0.
        kwargs: further arguments of `timm.create_model`, e.g. `init_values`.
        sr: the SR-Transformer's sparse attention and relative positions, each on or off.
        lora: train low-rank updates of the given weights alone (GigaPath-class encoders); the
            encoder that is exported has them added in.
    """

    name: str = "vit_tiny_patch16_224"
    pretrained: bool = False
    init_from: str = ""
    drop_path: float | None = None
    kwargs: dict[str, BackboneOption] = field(default_factory=dict)
    sr: SRConfig = field(default_factory=SRConfig)
    lora: LoRAChoice = field(default_factory=LoRAChoice)


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Crops of one tile: `num_global` of `global_px` pixels, then `num_local` of `local_px`."""

    global_px: int = 224
    local_px: int = 96
    num_global: int = 2
    num_local: int = 8


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Projection heads: an MLP of `num_layers`, L2 norm, weight-normed `out_dim` prototypes.

    Attributes:
        separate_ibot: a head of its own for masked patches, else shared with the class token.
    """

    out_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_layers: int = 3
    separate_ibot: bool = False


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Loss weights, temperatures and masks; a None is replaced by the method's published value.

    Attributes:
        koleo_weight: None: 0.1 for `dinov2`, 0 for `dino` and `ibot`.
        ibot_weight: None: 1 for `dinov2` and `ibot`, 0 for `dino`.
        centering: None: `sinkhorn` for `dinov2`, `centering` for `dino` and `ibot`.
        teacher_temp: of the teacher, at the end of its warm-up from `teacher_temp_start`.
        teacher_patch_temp: of its targets for masked patches, from the same start; None: as for the
            class token (DINOv2). iBOT has 0.07 here and a `teacher_temp` of 0.04.
        teacher_temp_warmup_steps: None: as many as the learning rate's warm-up.
        mask_share: share of the global crops that are masked, exactly int(2B * share) of them.
    """

    dino_weight: float = 1.0
    ibot_weight: float | None = None
    koleo_weight: float | None = None
    student_temp: float = 0.1
    teacher_temp_start: float = 0.04
    teacher_temp: float = 0.07
    teacher_patch_temp: float | None = None
    teacher_temp_warmup_steps: int | None = None
    centering: Literal["sinkhorn", "centering"] | None = None
    centre_momentum: float = 0.9
    mask_share: float = 0.5
    mask_ratio_min: float = 0.1
    mask_ratio_max: float = 0.5


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedules, all functions of the step.

    Attributes:
        lr: base rate; the peak is lr * sqrt(batch_size / 1024).
        clip_grad: largest gradient norm of each sub-module (backbone, each head); 0: no clip.
    """

    lr: float = 4e-3
    min_lr: float = 1e-6
    warmup_steps: int = 1000
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    beta1: float = 0.9
    beta2: float = 0.999
    layer_decay: float = 0.9
    patch_embed_lr_mult: float = 0.2
    freeze_last_layer_steps: int = 1000
    clip_grad: float = 3.0
    ema: float = 0.992
    ema_end: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pretraining run; defaults follow DINOv2 as UniCAS trains it.

    Attributes:
        batch_size: tiles per step over all workers together.
        accumulate: micro-batches that a worker's share of a step is cut into, to fit a small
            device; the gradient is that of the whole batch for every method.
        precision: `auto` is bf16 where the device has it in hardware (`cytoray.precision`), else
            fp32; weights are fp32 always.
        sharding: `ddp`: every worker holds the whole model; `fsdp`: a piece of it; `auto`: `fsdp`
            from a width of 1024 (ViT-L) on. A run may be resumed with another choice.
        pack_crops: run global and local crops through the blocks together; None: on CUDA, where a
            step is then half as many kernels. A CPU gains nothing by larger matrices and pays for
            joining and splitting.
        compile: `torch.compile` each block and the losses; None: on CUDA with Triton and a C
            compiler.
        checkpoint_blocks: recompute the blocks in the backward pass, to fit a small device.
        seed: of the initial weights, masks and drop path; none depends on the worker count.

    Raises:
        InputError: with every problem found.
    """

    method: str = "dinov2"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    two_views: TwoViewConfig = field(default_factory=TwoViewConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_size: int = 256
    accumulate: int = 1
    total_steps: int = 100_000
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    pack_crops: bool | None = None
    compile: bool | None = None
    checkpoint_blocks: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            *_method_problems(self),
            *backbone_problems(self),
            *_range_problems(self),
            *_optim_problems(self),
            *two_view_problems(self),
        ]
        raise_problems("the pretraining configuration cannot be used", problems)


def normalisation(
    config: PretrainConfig,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and std of the crops: those of the weights one starts from, else ImageNet's."""
    backbone = config.backbone
    start = Path(backbone.init_from).expanduser()
    if backbone.init_from and not start.exists():
        raise InputError(f"backbone.init_from: there is neither folder nor file at {start}")
    start = start / "encoder" if (start / "encoder").is_dir() else start
    if backbone.init_from and (start / SPEC_FILE).is_file():
        spec = read_encoder(start)[1]
        return spec.mean, spec.std
    if backbone.pretrained or backbone.init_from:
        published = published_normalisation(backbone.name)
        if published is not None:
            return _triple(published[0]), _triple(published[1])
    return _triple(IMAGENET_MEAN), _triple(IMAGENET_STD)


def encoder_spec(config: PretrainConfig, *, mpp: float | None = None) -> EncoderSpec:
    """Description of the encoder this run trains.

    Args:
        config: the run.
        mpp: resolution of the training tiles, um/px.
    """
    architecture, own = resolve_name(config.backbone.name)
    fixed = timm_options(architecture, config.crops.global_px)
    options = dict(own) | fixed | config.backbone.kwargs
    facts = backbone_facts(config.backbone.name, tuple(sorted(config.backbone.kwargs.items())))
    mean, std = normalisation(config)
    return EncoderSpec(
        architecture=architecture.split(".")[0],
        img_px=config.crops.global_px,
        mpp=mpp,
        mean=mean,
        std=std,
        patch_px=facts.patch_px if facts.is_transformer else 0,
        embed_dim=facts.embed_dim,
        pooling="cls" if facts.is_transformer else "model",
        kwargs=options,
        sr=replace(config.backbone.sr, form="auto") if config.backbone.sr.is_on else None,
        source={"method": config.method},
    )


def _triple(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _method_problems(config: PretrainConfig) -> list[str]:
    problems = []
    if config.method not in METHODS:
        problems.append(f"method {config.method!r} is none of {', '.join(sorted(METHODS))}")
    if config.precision not in ("auto", "fp32", "bf16"):
        problems.append(f"precision {config.precision!r} is none of auto, bf16, fp32")
    if config.sharding not in ("auto", "ddp", "fsdp"):
        problems.append(f"sharding {config.sharding!r} is none of auto, ddp, fsdp")
    if config.loss.centering not in (None, *TARGETS):
        problems.append(
            f"loss.centering {config.loss.centering!r} is none of {', '.join(sorted(TARGETS))}"
        )
    return problems


def _range_problems(config: PretrainConfig) -> list[str]:
    head, loss, backbone = config.head, config.loss, config.backbone
    checks = [
        (config.batch_size >= 2, "batch_size must be at least 2: tiles are told apart in a batch"),
        (
            1 <= config.accumulate <= config.batch_size,
            f"accumulate must be between 1 and batch_size {config.batch_size}, "
            f"is {config.accumulate}",
        ),
        (config.total_steps >= 1, "total_steps must be at least 1"),
        (config.seed >= 0, "seed must not be negative"),
        (
            min(head.out_dim, head.hidden_dim, head.bottleneck_dim, head.num_layers) >= 1,
            "head.out_dim, hidden_dim, bottleneck_dim and num_layers must be at least 1",
        ),
        (
            backbone.drop_path is None or 0 <= backbone.drop_path < 1,
            f"backbone.drop_path must be in [0, 1), is {backbone.drop_path}",
        ),
        (
            min(
                loss.student_temp,
                loss.teacher_temp_start,
                loss.teacher_temp,
                1.0 if loss.teacher_patch_temp is None else loss.teacher_patch_temp,
            )
            > 0,
            "loss.student_temp, teacher_temp_start, teacher_temp and teacher_patch_temp must be "
            "above 0",
        ),
        (
            min(loss.dino_weight, loss.ibot_weight or 0, loss.koleo_weight or 0) >= 0,
            "loss weights must not be negative",
        ),
        (0 <= loss.centre_momentum <= 1, "loss.centre_momentum must be in [0, 1]"),
        (0 <= loss.mask_share <= 1, "loss.mask_share must be in [0, 1]"),
        (
            0 < loss.mask_ratio_min <= loss.mask_ratio_max < 1,
            "loss.mask_ratio_min and mask_ratio_max must be 0 < min <= max < 1",
        ),
    ]
    return [message for fine, message in checks if not fine]


def _optim_problems(config: PretrainConfig) -> list[str]:
    optim = config.optim
    checks = [
        (optim.lr > 0 and optim.min_lr >= 0, "optim.lr must be above 0 and min_lr at least 0"),
        (
            0 <= optim.warmup_steps < config.total_steps,
            f"optim.warmup_steps {optim.warmup_steps} must be below total_steps "
            f"{config.total_steps}",
        ),
        (
            min(optim.weight_decay, optim.weight_decay_end, optim.clip_grad) >= 0,
            "optim.weight_decay, weight_decay_end and clip_grad must not be negative",
        ),
        (0 <= optim.beta1 < 1 and 0 <= optim.beta2 < 1, "optim.beta1, beta2 must be in [0, 1)"),
        (0 < optim.layer_decay <= 1, "optim.layer_decay must be in (0, 1]"),
        (optim.patch_embed_lr_mult >= 0, "optim.patch_embed_lr_mult must not be negative"),
        (optim.freeze_last_layer_steps >= 0, "optim.freeze_last_layer_steps must not be negative"),
        (
            0 <= optim.ema <= 1 and 0 <= optim.ema_end <= 1,
            "optim.ema and ema_end must be in [0, 1]",
        ),
    ]
    return [message for fine, message in checks if not fine]
