import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cytoray.errors import InputError
from cytoray.models.encoder import (
    EncoderSpec,
    load_encoder,
    read_encoder,
    save_encoder,
    weights_id,
)

KWARGS = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def _spec(**changes):
    values = {
        "architecture": "vit_tiny_patch16_224",
        "img_px": 32,
        "mpp": 0.5,
        "mean": MEAN,
        "std": STD,
        "patch_px": 16,
        "embed_dim": 32,
        "kwargs": KWARGS,
    }
    return EncoderSpec(**values | changes)


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **KWARGS).state_dict()


def test_plain_timm_loads_the_folder_with_equal_features(tmp_path, weights):
    folder = save_encoder(tmp_path / "encoder", weights, _spec())
    assert sorted(p.name for p in folder.iterdir()) == ["encoder.json", "model.safetensors"]
    spec = json.loads((folder / "encoder.json").read_text())
    model = timm.create_model(spec["architecture"], num_classes=0, **spec["kwargs"]).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))

    encoder = load_encoder(folder)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    images = pixels.permute(0, 3, 1, 2) / 255.0
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), model(images))
    assert not encoder.training
    assert encoder.spec == _spec()
    assert spec["encoder_id"] == encoder.encoder_id == weights_id(weights)
    assert len(encoder.encoder_id) == 16


def test_layouts_types_and_sizes(tmp_path, weights):
    encoder = load_encoder(save_encoder(tmp_path / "e", weights, _spec()))
    pixels = torch.randint(0, 256, (2, 48, 40, 3), dtype=torch.uint8)
    with torch.no_grad():
        out = encoder(pixels)
        torch.testing.assert_close(encoder(pixels.permute(0, 3, 1, 2)), out)
        torch.testing.assert_close(encoder(pixels / 255.0), out)
    assert out.shape == (2, 32)
    prepared = encoder.prepare(pixels)
    assert prepared.shape == (2, 3, 32, 32)
    resized = F.interpolate(
        pixels.permute(0, 3, 1, 2) / 255.0, (32, 32), mode="bicubic", antialias=True
    )
    undone = prepared * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(undone, resized.clamp(0, 1))
    with pytest.raises(InputError, match=r"\(2, 48, 40\)"):
        encoder(pixels[..., 0])


def test_identity_follows_the_weights(tmp_path, weights):
    other = {k: v.clone() for k, v in weights.items()}
    other["norm.bias"][0] += 1e-3
    assert weights_id(other) != weights_id(weights)
    assert weights_id(dict(reversed(weights.items()))) == weights_id(weights)


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path, weights):
    save_encoder(tmp_path / "e", weights, _spec(mpp=0.25))
    save_encoder(tmp_path / "e", weights, _spec(mpp=1.0))
    assert read_encoder(tmp_path / "e")[1].mpp == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_a_failed_save_leaves_the_old_one(tmp_path, weights):
    save_encoder(tmp_path / "e", weights, _spec())
    with pytest.raises(TypeError):
        save_encoder(tmp_path / "e", weights, _spec(source={"cannot": object()}))
    assert read_encoder(tmp_path / "e")[1] == _spec()
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_damage_is_found(tmp_path, weights):
    folder = save_encoder(tmp_path / "e", weights, _spec())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(InputError, match="damaged"):
        read_encoder(folder)
    (folder / "model.safetensors").write_bytes(data[:-4] + b"\1\1\1\1")
    with pytest.raises(InputError, match="differ"):
        read_encoder(folder)
    (folder / "encoder.json").unlink()
    with pytest.raises(InputError, match=r"encoder\.json not there"):
        read_encoder(folder)


def test_timm_names(tmp_path):
    first = load_encoder("vit_tiny_patch16_224", pretrained=False, seed=3, kwargs=KWARGS)
    again = load_encoder("vit_tiny_patch16_224", pretrained=False, seed=3, kwargs=KWARGS)
    other = load_encoder("vit_tiny_patch16_224", pretrained=False, seed=4, kwargs=KWARGS)
    assert first.encoder_id == again.encoder_id != other.encoder_id
    assert (first.spec.img_px, first.spec.patch_px, first.embed_dim) == (32, 16, 32)
    with torch.no_grad():
        assert first(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape == (1, 32)
    resnet = load_encoder("resnet10t", pretrained=False)
    assert (resnet.spec.patch_px, resnet.embed_dim) == (0, 512)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_poolings(tmp_path, weights, pooling):
    encoder = load_encoder(save_encoder(tmp_path / "e", weights, _spec(pooling=pooling)))
    images = torch.rand(2, 32, 32, 3)
    tokens = encoder.model.forward_features(encoder.prepare(images))
    parts = {"cls": [tokens[:, 0]], "mean": [tokens[:, 1:].mean(1)]}
    parts["cls+mean"] = parts["cls"] + parts["mean"]
    torch.testing.assert_close(encoder(images), torch.cat(parts[pooling], 1))
    assert encoder.embed_dim == encoder(images).shape[1]


def test_unknown_names_and_bad_descriptions(tmp_path):
    with pytest.raises(InputError, match=r"did you mean .*vit_tiny_patch16_224"):
        load_encoder("vit_tiny_patch16_22")
    with pytest.raises(InputError, match=r"cannot be loaded.*dpeth"):
        load_encoder("vit_tiny_patch16_224", pretrained=False, kwargs={"dpeth": 3})
    with pytest.raises(InputError, match=r"(?s)pooling 'max'.*mpp must be above 0"):
        _spec(pooling="max", mpp=-1.0)


def test_a_checkpoint_folder_holds_its_encoder(tmp_path, weights):
    save_encoder(tmp_path / "step_1" / "encoder", weights, _spec())
    assert load_encoder(tmp_path / "step_1").encoder_id == weights_id(weights)
