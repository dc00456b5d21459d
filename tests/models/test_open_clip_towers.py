from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file

from cytoray.errors import InputError
from cytoray.finetune import adapt, parse_adapter
from cytoray.finetune.adapters import merged_weights
from cytoray.models import load_encoder, save_encoder
from cytoray.models.lora import trainable_parameters
from cytoray.models.open_clip_towers import tower_as_timm

open_clip = pytest.importorskip("open_clip")


def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def small(monkeypatch):
    """A small ViT, a small timm ViT and a ResNet as models open_clip knows."""
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    trunk = {
        "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False,
        "timm_pool": "", "timm_proj": "linear", "image_size": 224,
    }  # fmt: skip
    configs = {
        "plain": {"vision_cfg": vision},
        "quick": {"vision_cfg": vision, "quick_gelu": True},
        "trunk": {"vision_cfg": trunk},
        "mlp": {"vision_cfg": trunk | {"timm_proj": "mlp"}},
    }
    for name, config in configs.items():
        full = {"embed_dim": 12, "text_cfg": text, **config}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, full)


@pytest.mark.parametrize("name", ["plain", "quick", "trunk"])
def test_a_tower_gives_the_embedding_open_clip_gives(small, name: str, tmp_path) -> None:
    encoder = load_encoder(f"random:open_clip:{name}", seed=5)
    assert (encoder.embed_dim, encoder.spec.img_px) == (12, 224 if name == "trunk" else 32)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        clip = open_clip.create_model(name).eval()
    images = encoder.prepare(pixels())
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels()), clip.encode_image(images), atol=1e-5, rtol=0)
    assert encoder.spec.mean == tuple(open_clip.get_model_preprocess_cfg(clip)["mean"])
    folder = save_encoder(tmp_path / "e", encoder.model.state_dict(), encoder.spec)
    plain = timm.create_model(encoder.spec.architecture, **encoder.spec.kwargs).eval()
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        assert torch.allclose(plain(images), encoder(pixels()), atol=1e-5, rtol=0)


def test_lora_on_a_tower_merges_back(small) -> None:
    encoder = load_encoder("random:open_clip:quick")
    adapted = adapt(encoder, parse_adapter("lora:q,k,v,o,mlp:2"))
    assert torch.allclose(adapted(pixels()), encoder(pixels()), atol=1e-6, rtol=0)
    with torch.no_grad():
        for value in trainable_parameters(adapted).values():
            value.add_(0.1)
    moved = adapted(pixels())
    assert not torch.allclose(moved, encoder(pixels()), atol=1e-3)
    encoder.model.load_state_dict(merged_weights(adapted))
    assert torch.allclose(encoder(pixels()), moved, atol=1e-5, rtol=0)


def test_towers_that_are_no_plain_vit_are_refused(small) -> None:
    with pytest.raises(InputError, match=r"ModifiedResNet\) cannot be used: it is not a ViT"):
        tower_as_timm(open_clip.create_model("RN50").visual, 224)
    clip = open_clip.create_model("mlp")
    with pytest.raises(InputError, match="its projection is not one Linear"):
        tower_as_timm(clip.visual, 224)


def test_unknown_models_and_weights_list_the_valid_ones() -> None:
    with pytest.raises(InputError, match=r"unknown open_clip model 'ViT-B-166'; did you mean"):
        load_encoder("open_clip:ViT-B-166/openai")
    with pytest.raises(InputError, match=r"no weights 'opnai' for .*; valid: ViT-B-16/openai"):
        load_encoder("open_clip:ViT-B-16/opnai")


def test_without_a_connection_the_message_says_so(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("quilt", "biomedclip", "open_clip:ViT-B-32/laion2b_s34b_b79k"):
        with pytest.raises(InputError, match="without a connection to the hub"):
            load_encoder(name)
