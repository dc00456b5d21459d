"""The SR-Transformer inside pretraining: configuration, engine, and the encoder that comes out."""

import dataclasses
import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from cytoray.config import from_plain, to_plain
from cytoray.errors import InputError
from cytoray.models import SRConfig, load_encoder, save_encoder, use_sr
from cytoray.models.backbones import build_backbone
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    HeadConfig,
    OptimConfig,
    PretrainConfig,
    PretrainEngine,
    encoder_spec,
)

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}
SR = SRConfig(sparse=True, irpe=True, top_h=3)


def _config(method="dinov2", sr=SR, **changes):
    values = {
        "precision": "fp32",
        "method": method,
        "backbone": BackboneConfig(kwargs=dict(TINY), sr=sr),
        "crops": CropConfig(global_px=64, local_px=32, num_local=2),
        "head": HeadConfig(out_dim=48, hidden_dim=32, bottleneck_dim=16),
        "optim": OptimConfig(lr=0.05, warmup_steps=1, freeze_last_layer_steps=0),
        "batch_size": 4,
        "total_steps": 10,
    }
    return PretrainConfig(**(values | changes))


def _batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "global_crops": torch.randn(4, 2, 3, 64, 64, generator=generator),
        "local_crops": torch.randn(4, 2, 3, 32, 32, generator=generator),
    }


@pytest.mark.parametrize("method", ["dino", "ibot", "dinov2"])
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_tables_are_trained_on_both_crop_sizes(method, checkpoint_blocks):
    engine = PretrainEngine(_config(method, checkpoint_blocks=checkpoint_blocks), "cpu")
    losses = [float(engine.step(_batch(step), step)["loss"]) for step in range(3)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    state = engine.method.state_dict()
    for side in ("student", "teacher"):
        for table in ("rel_k", "rel_q", "rel_v"):
            assert state[f"{side}.backbone.vit.blocks.1.attn.{table}"].abs().max() > 0
    again = PretrainEngine(_config(method), "cpu")
    again.load_state_dict(engine.state_dict())
    got, expected = again.step(_batch(9), 3), engine.step(_batch(9), 3)
    torch.testing.assert_close(got["loss"], expected["loss"])


def test_switching_it_on_does_not_change_the_start():
    plain = PretrainEngine(_config(sr=SRConfig()), "cpu").method.state_dict()
    sr = PretrainEngine(_config(), "cpu").method.state_dict()
    assert all(torch.equal(sr[key], value) for key, value in plain.items())
    assert all(not sr[key].any() for key in set(sr) - set(plain))
    first, second = (
        PretrainEngine(_config(sr=sr), "cpu").step(_batch(0), 0)["loss"]
        for sr in (SRConfig(), SRConfig(irpe=True))
    )
    torch.testing.assert_close(first, second)


def test_encoder_folder_says_that_it_has_sr(tmp_path):
    config = _config()
    engine = PretrainEngine(config, "cpu")
    for step in range(2):
        engine.step(_batch(step), step)
    spec = encoder_spec(config, mpp=0.5)
    assert spec.sr == SR
    folder = save_encoder(tmp_path / "encoder", engine.encoder_state_dict(), spec)

    encoder = load_encoder(folder)
    assert encoder.spec == spec
    images = torch.rand(2, 3, 64, 64)
    expected = engine.method.encoder().eval()(encoder.prepare(images)).cls
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), expected.detach())

    plain = json.loads((folder / "encoder.json").read_text())
    assert plain["sr"] == dataclasses.asdict(SR)
    vit = timm.create_model(plain["architecture"], num_classes=0, **plain["kwargs"])
    vit = use_sr(vit, **plain["sr"]).eval()
    vit.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(vit(encoder.prepare(images)), expected.detach())

    wrong = dataclasses.replace(spec, sr=None)
    save_encoder(tmp_path / "wrong", engine.encoder_state_dict(), wrong)
    with pytest.raises(InputError, match="rel_k"):
        load_encoder(tmp_path / "wrong")
    goes_on = _config(backbone=BackboneConfig(kwargs=dict(TINY), sr=SR, init_from=str(folder)))
    started = PretrainEngine(goes_on, "cpu").method.encoder().vit.state_dict()
    assert all(torch.equal(started[k], v) for k, v in engine.encoder_state_dict().items())


def test_a_plain_encoder_has_no_sr(tmp_path):
    config = _config(sr=SRConfig())
    spec = encoder_spec(config)
    assert spec.sr is None
    weights = PretrainEngine(config, "cpu").encoder_state_dict()
    folder = save_encoder(tmp_path / "encoder", weights, spec)
    assert load_encoder(folder).spec == spec


def test_plain_weights_start_an_sr_backbone():
    torch.manual_seed(0)
    plain = build_backbone("vit_tiny_patch16_224", img_px=32, kwargs=TINY).vit.state_dict()
    torch.manual_seed(1)
    options = {"img_px": 32, "kwargs": TINY}
    sr = build_backbone("vit_tiny_patch16_224", weights=plain, sr=SR, **options).vit.state_dict()
    assert all(torch.equal(sr[key], value) for key, value in plain.items())
    assert not sr["blocks.0.attn.rel_k"].any()
    with pytest.raises(InputError, match="rel_k"):
        build_backbone("vit_tiny_patch16_224", weights=sr, **options)
    missing = {k: v for k, v in sr.items() if k != "blocks.0.attn.qkv.weight"}
    with pytest.raises(InputError, match=r"qkv\.weight"):
        build_backbone("vit_tiny_patch16_224", weights=missing, sr=SR, **options)


def test_config_goes_through_plain_values_and_is_checked():
    config = _config()
    assert from_plain(PretrainConfig, to_plain(config)) == config
    dropping = BackboneConfig(kwargs=TINY | {"attn_drop_rate": 0.1}, sr=SR)
    with pytest.raises(InputError, match="attn_drop_rate=0"):
        _config(backbone=dropping)
    _config(backbone=dataclasses.replace(dropping, sr=SRConfig()))
    with pytest.raises(InputError, match="top_h is 0"):
        SRConfig(top_h=0)
