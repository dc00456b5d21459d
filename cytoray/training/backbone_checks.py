"""Whether a backbone, its plug-ins, the crops and the method of a run fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cytoray.errors import InputError
from cytoray.models.backbones import BackboneFacts, backbone_facts

if TYPE_CHECKING:
    from cytoray.training.config import CropConfig, PretrainConfig


def backbone_problems(config: PretrainConfig) -> list[str]:
    """What keeps `config` from training its backbone on its crops; empty if nothing does."""
    crops, backbone = config.crops, config.backbone
    problems = []
    if crops.num_global < 1 or crops.num_local < 0:
        problems.append("crops.num_global must be at least 1 and crops.num_local at least 0")
    if crops.num_global * (crops.num_global - 1 + crops.num_local) < 1:
        problems.append("one global and no local crop make no pair; set crops.num_global to 2")
    if backbone.lora.rank and not (backbone.pretrained or backbone.init_from):
        problems.append(
            "backbone.lora adapts weights that are there: set backbone.pretrained or init_from"
        )
    try:
        options = tuple(sorted(backbone.kwargs.items()))
        facts = backbone_facts(backbone.name, options, backbone.sr, crops.global_px, backbone.lora)
    except InputError as error:
        return [*problems, str(error)]
    problems += _size_problems(crops, facts)
    if backbone.lora.rank and config.sharding == "fsdp":
        problems.append("with backbone.lora there is little to shard; set sharding to ddp")
    return problems if facts.is_transformer else [*problems, *_resnet_problems(config)]


def _size_problems(crops: CropConfig, facts: BackboneFacts) -> list[str]:
    sizes = {"global_px": crops.global_px}
    if crops.num_local:
        sizes["local_px"] = crops.local_px
    problems = []
    for name, size_px in sizes.items():
        patch_px = facts.patch_px
        if not facts.is_transformer and size_px >= patch_px:
            continue  # a convolution takes any size
        if size_px < patch_px or size_px % patch_px:
            below = max(size_px // patch_px, 1) * patch_px
            problems.append(
                f"crops.{name} {size_px} is not a multiple of the patch of {patch_px} px; "
                f"take {below} or {below + patch_px}"
                if facts.is_transformer
                else f"crops.{name} {size_px} is smaller than a place of the last map of a "
                f"ResNet, {patch_px} px"
            )
    return problems


def _resnet_problems(config: PretrainConfig) -> list[str]:
    """What a backbone without tokens cannot do."""
    name, masks = config.backbone.name, config.loss.ibot_weight
    checks = [
        (
            config.method not in ("dinov2", "ibot") and not masks,
            f"{config.method} hides patches from the backbone, and {name} has none: take a ViT, "
            "or one of the methods byol, dino, moco, simclr",
        ),
        (
            not config.backbone.drop_path,
            f"backbone.drop_path is for transformer blocks; leave it out with {name}",
        ),
        (
            config.accumulate == 1,
            f"accumulate must be 1 with {name}: its batch norm sees the batch as a whole",
        ),
        (config.sharding != "fsdp", f"sharding fsdp cuts transformer blocks; {name} takes ddp"),
        (
            not config.checkpoint_blocks,
            f"checkpoint_blocks would run the batch norm of {name} twice a step; leave it off",
        ),
    ]
    return [message for fine, message in checks if not fine]
