import pytest
import timm
import torch

from cytoray.config import from_plain, to_plain
from cytoray.errors import InputError
from cytoray.models.encoder import save_encoder
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    HeadConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    encoder_spec,
)
from cytoray.training.config import normalisation
from cytoray.training.sharding import resolve_sharding


def test_every_problem_is_reported_at_once():
    with pytest.raises(InputError) as caught:
        PretrainConfig(
            method="dinov9",
            backbone=BackboneConfig(name="vit_tiny_patch16_22", drop_path=1.5),
            crops=CropConfig(num_global=1, num_local=0),
            head=HeadConfig(out_dim=0),
            loss=LossConfig(mask_ratio_min=0.6),
            optim=OptimConfig(warmup_steps=500, lr=-1.0),
            batch_size=1,
            total_steps=100,
        )
    text = str(caught.value)
    for words in (
        "method 'dinov9' is none of byol, dino, dinov2, ibot, moco, simclr",
        "did you mean vit_tiny_patch16_224",
        "drop_path must be in [0, 1), is 1.5",
        "make no pair",
        "head.out_dim",
        "mask_ratio_min",
        "warmup_steps 500 must be below total_steps 100",
        "optim.lr",
        "batch_size must be at least 2",
    ):
        assert words in text
    assert len(caught.value.problems) == 9


def test_crops_must_be_multiples_of_the_patch():
    with pytest.raises(
        InputError, match=r"(?s)global_px 225 .*16 px; take 224 or 240.*local_px 90"
    ):
        PretrainConfig(crops=CropConfig(global_px=225, local_px=90))
    with pytest.raises(InputError, match="local_px 8"):
        PretrainConfig(crops=CropConfig(local_px=8))
    PretrainConfig(crops=CropConfig(local_px=8, num_local=0))
    with pytest.raises(InputError, match="patch of 14 px"):
        PretrainConfig(backbone=BackboneConfig(name="vit_small_patch14_dinov2"))


def test_goes_through_plain_values():
    config = PretrainConfig(
        backbone=BackboneConfig(kwargs={"depth": 2, "init_values": 1e-5}),
        loss=LossConfig(centering="centering"),
    )
    assert from_plain(PretrainConfig, to_plain(config)) == config


def test_normalisation_follows_the_starting_weights(tmp_path):
    kwargs: dict = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    config = PretrainConfig(backbone=BackboneConfig(kwargs=kwargs))
    assert normalisation(config)[0] == (0.485, 0.456, 0.406)
    published = PretrainConfig(backbone=BackboneConfig(pretrained=True))
    assert normalisation(published) == ((0.5,) * 3, (0.5,) * 3)
    spec = encoder_spec(config, mpp=0.5)
    assert (spec.mpp, spec.img_px, spec.patch_px, spec.embed_dim) == (0.5, 224, 16, 32)
    torch.manual_seed(0)
    model = timm.create_model(spec.architecture, num_classes=0, **spec.kwargs)
    folder = save_encoder(tmp_path / "e", model.state_dict(), spec)
    again = PretrainConfig(backbone=BackboneConfig(kwargs=kwargs, init_from=str(folder)))
    assert normalisation(again) == (spec.mean, spec.std)
    file = BackboneConfig(kwargs=kwargs, init_from=str(folder / "model.safetensors"))
    assert normalisation(PretrainConfig(backbone=file)) == ((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(InputError, match="neither folder nor file"):
        normalisation(PretrainConfig(backbone=BackboneConfig(init_from=str(tmp_path / "no"))))


@pytest.mark.parametrize(
    ("name", "changes", "workers", "chosen"),
    [
        ("vit_large_patch16_224", {}, 8, "fsdp"),
        ("vit_large_patch16_224", {}, 1, "none"),
        ("vit_large_patch16_224", {"sharding": "ddp"}, 8, "ddp"),
        ("vit_base_patch16_224", {}, 8, "ddp"),
        ("vit_base_patch16_224", {"sharding": "fsdp"}, 8, "fsdp"),
        ("resnet50", {"method": "dino"}, 8, "ddp"),
    ],
)
def test_sharding_follows_the_size_of_the_encoder(name, changes, workers, chosen):
    config = PretrainConfig(backbone=BackboneConfig(name=name), **changes)
    spec = encoder_spec(config)
    got = resolve_sharding(
        config,
        world_size=workers,
        embed_dim=spec.embed_dim,
        is_transformer=spec.patch_px > 0,
    )
    assert got == chosen
