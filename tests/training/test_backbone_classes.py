"""Each class of backbone through the engine, and every method with every plug-in."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cytoray.config import from_plain, to_plain
from cytoray.errors import InputError
from cytoray.models import SRConfig, load_encoder, save_encoder, use_sr
from cytoray.models.backbones import LoRAChoice
from cytoray.perturb.nuclei_centred import nuclei_centred_views
from cytoray.perturb.seeds import tile_rng
from cytoray.perturb.views import CROP_POLICIES
from cytoray.ssl.methods import METHODS
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    HeadConfig,
    OptimConfig,
    PretrainConfig,
    PretrainEngine,
    TwoViewConfig,
    encoder_spec,
)
from cytoray.training.costs import step_costs

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 2}
TWO_VIEWS = ("byol", "moco", "simclr")
BACKBONES = {
    "vit": BackboneConfig(kwargs=dict(TINY), drop_path=0.3),
    "registers": BackboneConfig(
        name="vit_small_patch14_reg4_dinov2", kwargs=TINY | {"patch_size": 16}
    ),
    "dinov3": BackboneConfig(
        name="vit_small_patch16_dinov3", kwargs=TINY | {"init_values": 0.1}, drop_path=0.3
    ),
    "dinov3 sr": BackboneConfig(
        name="vit_small_patch16_dinov3",
        kwargs=TINY | {"init_values": 0.1},
        sr=SRConfig(sparse=True, irpe=True, top_h=3),
    ),
    "resnet": BackboneConfig(name="resnet10t"),
}


def _config(method, backbone, **changes):
    alike = method in TWO_VIEWS
    values = {
        "precision": "fp32",
        "method": method,
        "backbone": backbone,
        "crops": CropConfig(global_px=64, local_px=32, num_local=0 if alike else 2),
        "head": HeadConfig(out_dim=48, hidden_dim=32, bottleneck_dim=16),
        "two_views": TwoViewConfig(hidden_dim=24, out_dim=12),
        "optim": OptimConfig(lr=0.02, warmup_steps=1, freeze_last_layer_steps=0),
        "batch_size": 4,
        "total_steps": 10,
    }
    return PretrainConfig(**(values | changes))


def _batch(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    crops = config.crops
    batch = {"global_crops": torch.randn(4, 2, 3, 64, 64, generator=generator)}
    if crops.num_local:
        batch["local_crops"] = torch.randn(4, crops.num_local, 3, 32, 32, generator=generator)
    return batch


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "dinov2") for name in BACKBONES if name != "resnet"]
    + [("resnet", method) for method in ("dino", "simclr", "moco", "byol")],
)
def test_steps_and_the_encoder_that_comes_out(name, method, tmp_path):
    config = _config(method, BACKBONES[name])
    assert from_plain(PretrainConfig, to_plain(config)) == config
    engine = PretrainEngine(config, "cpu")
    # the rate of the first step is 0
    losses = [engine.step(_batch(config), step)["loss"] for step in range(3)]
    assert torch.stack(losses).isfinite().all()
    assert losses[1] != losses[2]
    spec = encoder_spec(config, mpp=0.5)
    folder = save_encoder(tmp_path / "encoder", engine.encoder_state_dict(), spec)
    encoder = load_encoder(folder)
    images = encoder.prepare(torch.rand(2, 3, 64, 64))
    with torch.no_grad():
        expected = engine.method.encoder().eval()(images).cls
        plain = json.loads((folder / "encoder.json").read_text())
        model = timm.create_model(plain["architecture"], num_classes=0, **plain["kwargs"])
        if plain["sr"]:
            use_sr(model, **plain["sr"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        torch.testing.assert_close(model.eval()(images), expected, atol=1e-6, rtol=1e-6)
        features = encoder(torch.rand(3, 3, 64, 64))
    assert features.shape == (3, spec.embed_dim)
    costs = step_costs(config, precision="fp32")
    assert costs.flops_per_tile > 0
    assert costs.num_backbone_parameters == sum(p.numel() for p in model.parameters())


def test_a_resnet_teacher_keeps_its_own_averages():
    config = _config("dino", BACKBONES["resnet"])
    engine = PretrainEngine(config, "cpu")
    before = {k: v.clone() for k, v in engine.method.state_dict().items()}
    engine.step(_batch(config), 0)
    after = engine.method.state_dict()
    for side in ("student", "teacher"):
        key = f"{side}.backbone.net.layer4.0.bn1.running_mean"
        assert not torch.equal(before[key], after[key])
    tied = [k for k in after if k.startswith("teacher") and k.endswith("bn1.weight")]
    assert all(torch.allclose(after[k], before[k], atol=1e-2) for k in tied)
    groups = {id(p): g for g in engine.optimizer.param_groups for p in g["params"]}
    net = engine.method.student.backbone.net
    assert groups[id(net.layer3[0].bn1.weight)]["wd_mult"] == 0.0
    assert groups[id(net.layer3[0].conv1.weight)]["wd_mult"] == 1.0
    rates = [groups[id(p)]["lr_mult"] for p in (net.conv1[0].weight, net.layer1[0].conv1.weight)]
    assert rates == pytest.approx([0.9**5, 0.9**4])


def _started_from(tmp_path, name="vit_tiny_patch16_224"):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, img_size=96, **TINY)
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    return BackboneConfig(
        name=name,
        kwargs=dict(TINY),
        init_from=str(tmp_path / "start.safetensors"),
        lora=LoRAChoice(rank=2, targets=("q", "v", "mlp")),
    )


@pytest.mark.parametrize("method", ["dinov2", "byol"])
def test_lora_trains_adapters_and_heads_alone(method, tmp_path):
    config = _config(method, _started_from(tmp_path))
    engine = PretrainEngine(config, "cpu")
    student, teacher = engine.method.student.backbone, engine.method.teacher.backbone
    trained = {n for n, p in student.vit.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    base = "blocks.0.attn.qkv.k.weight"
    shared = (student.vit.get_parameter(base), teacher.vit.get_parameter(base))
    assert shared[0] is shared[1]
    before = engine.encoder_state_dict()
    kept = shared[0].clone()
    for step in range(3):
        assert engine.step(_batch(config, step), step)["loss"].isfinite()
    assert torch.equal(student.vit.get_parameter(base), kept)
    after = engine.encoder_state_dict()
    assert set(after) == set(before)
    width = 48
    changed = [k for k in after if not torch.equal(after[k], before[k])]
    assert all(".qkv.weight" in k or ".mlp.fc" in k for k in changed)
    assert "blocks.1.attn.qkv.weight" in changed
    key = "blocks.1.attn.qkv.weight"
    assert torch.equal(after[key][width : 2 * width], before[key][width : 2 * width])
    a = "blocks.1.attn.qkv.q.lora_B.default.weight"
    assert not torch.equal(teacher.vit.get_parameter(a), student.vit.get_parameter(a)) or (
        method == "byol"
    )
    spec = encoder_spec(config)
    again = load_encoder(save_encoder(tmp_path / "e", after, spec))
    images = again.prepare(torch.rand(2, 3, 64, 64))
    with torch.no_grad():
        expected = engine.method.encoder().eval()(images).cls
        torch.testing.assert_close(again.model(images), expected, atol=1e-5, rtol=1e-5)
    resumed = PretrainEngine(config, "cpu")
    resumed.load_state_dict(engine.state_dict())
    batch = _batch(config, 9)
    assert torch.equal(resumed.step(batch, 3)["loss"], engine.step(batch, 3)["loss"])
    full, little = (
        step_costs(_config(method, BackboneConfig(kwargs=dict(TINY)))),
        step_costs(config),
    )
    assert little.state_bytes < full.state_bytes
    assert little.flops_per_tile < full.flops_per_tile


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("irpe", [False, True])
@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_plug_ins_are_independent(method, perturbed, irpe, sparse):
    sr = SRConfig(sparse=sparse, irpe=irpe, top_h=2)
    config = _config(method, BackboneConfig(kwargs=dict(TINY), sr=sr))
    policy = CROP_POLICIES[method]
    assert policy.num_global == 2
    policy = dataclasses.replace(policy, num_local=config.crops.num_local)
    pixels, views = [], []
    for tile in range(4):
        image = np.random.default_rng(tile).integers(0, 256, (96, 96, 3), np.uint8)
        nuclei = np.array([[20.0, 30.0], [60.0, 70.0]], np.float32)
        made = nuclei_centred_views(
            image, nuclei, 12.0, policy, tile_rng(0, 0, str(tile)), perturbed=perturbed
        )
        assert np.array_equal(made.tile, image) != perturbed
        pixels.append(made.tile)
        views.append(made.views)
    batch = {"pixels": np.stack(pixels), "views": np.stack(views)}
    engine = PretrainEngine(config, "cpu")
    first = engine.step(batch, 0)
    assert first["loss"].isfinite()
    names = [k for k in engine.method.state_dict() if k.endswith("rel_v")]
    assert bool(names) == irpe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "dinov2"}, "dinov2 hides patches.* byol, dino, moco, simclr"),
        ({"method": "ibot"}, "ibot hides patches"),
        ({"accumulate": 2}, "accumulate must be 1 with resnet10t"),
        ({"checkpoint_blocks": True}, "checkpoint_blocks"),
        ({"sharding": "fsdp"}, "takes ddp"),
        ({"crops": CropConfig(global_px=64, local_px=16)}, "local_px 16 is smaller"),
        ({"backbone": BackboneConfig(name="resnet10t", drop_path=0.1)}, "drop_path"),
        (
            {"backbone": BackboneConfig(name="resnet10t", sr=SRConfig(sparse=True))},
            "(?s)SR-Transformer cannot be used with ResNet.*no attention",
        ),
        (
            {
                "backbone": BackboneConfig(
                    name="resnet10t", pretrained=True, lora=LoRAChoice(rank=2)
                )
            },
            "LoRA needs a ViT",
        ),
        (
            {"backbone": BackboneConfig(kwargs=dict(TINY), lora=LoRAChoice(rank=2))},
            "set backbone.pretrained or init_from",
        ),
        ({"backbone": BackboneConfig(name="resnet5O")}, "did you mean resnet50"),
        ({"backbone": BackboneConfig(name="vit_smal_patch16_dinov3")}, "vit_small_patch16_dinov3"),
    ],
)
def test_what_a_backbone_cannot_do(changes, words):
    values = {"method": "dino", "backbone": BACKBONES["resnet"]} | changes
    with pytest.raises(InputError, match=words):
        _config(values.pop("method"), values.pop("backbone"), **values)
