from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from cytoray.errors import InputError
from cytoray.models import load_encoder, save_encoder
from cytoray.models.sources import KNOWN, weights_error
from cytoray.models.weight_files import hub_connection, read_weights

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def pixels(side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def vit():
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY).eval()


@pytest.fixture
def no_hub(monkeypatch) -> None:
    """The hub's client looks into its (empty) cache alone, as without a connection."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_random_weights_hang_on_the_seed_and_leave_the_generator() -> None:
    before = torch.random.get_rng_state()
    first = load_encoder("random:vit_tiny_patch16_224", kwargs=TINY)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.encoder_id == load_encoder("random:vit_tiny_patch16_224", kwargs=TINY).encoder_id
    other = load_encoder("vit_tiny_patch16_224", pretrained=False, seed=1, kwargs=TINY)
    assert other.encoder_id != first.encoder_id
    assert first.spec.source == {"timm": "vit_tiny_patch16_224", "pretrained": False, "seed": 0}


def test_a_file_of_weights_with_a_name(vit, tmp_path) -> None:
    weights = vit.state_dict()
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({"model": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        encoder = load_encoder(f"vit_tiny_patch16_224@{tmp_path / name}", kwargs=TINY)
        with torch.no_grad():
            expected = vit.forward_head(
                vit.forward_features(encoder.prepare(pixels())), pre_logits=True
            )
            torch.testing.assert_close(encoder(pixels()), expected)


def test_files_that_do_not_fit_say_where(vit, tmp_path) -> None:
    weights = vit.state_dict()
    del weights["norm.weight"]
    save_file(weights | {"extra": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"norm\.weight is missing(.|\n)*extra is not a weight"):
        load_encoder(f"vit_tiny_patch16_224@{tmp_path / 'a.safetensors'}", kwargs=TINY)
    with pytest.raises(InputError, match="no file of weights"):
        read_weights(tmp_path / "gone.pth")
    torch.save({"a": object()}, tmp_path / "code.pth")
    with pytest.raises(InputError, match="more than tensors"):
        read_weights(tmp_path / "code.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_weights(tmp_path / "bad.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="does not hold tensors by name"):
        read_weights(tmp_path / "list.pth")


def test_a_local_folder_of_timm_is_exported_under_its_architecture(vit, tmp_path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": TINY,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3,
                           "classifier": "head", "num_classes": 5},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(vit.state_dict(), folder / "model.safetensors")
    encoder = load_encoder(f"local-dir:{folder}")
    assert encoder.spec.architecture == "vit_tiny_patch16_224"
    with torch.no_grad():
        expected = vit.forward_head(
            vit.forward_features(encoder.prepare(pixels())), pre_logits=True
        )
        torch.testing.assert_close(encoder(pixels()), expected)
    assert load_encoder(folder).encoder_id == encoder.encoder_id
    saved = save_encoder(tmp_path / "ours", encoder.model.state_dict(), encoder.spec)
    torch.testing.assert_close(load_encoder(saved)(pixels()), encoder(pixels()))
    with pytest.raises(InputError, match="cannot be loaded: Config file not found"):
        load_encoder(f"local-dir:{tmp_path / 'gone'}")


@pytest.mark.parametrize("name", ["uni", "gigapath", "hf-hub:MahmoodLab/UNI"])
def test_gated_weights_say_what_to_accept_and_set(no_hub, name: str) -> None:
    with pytest.raises(InputError) as error:
        load_encoder(name)
    text = str(error.value)
    hub = KNOWN.get(name, KNOWN["uni"]).source.removeprefix("hf-hub:")
    for said in (f"accept the terms at https://huggingface.co/{hub}", "export HF_TOKEN=hf_...",
                 f"hf download {hub}", "local-dir:FOLDER", "random:"):  # fmt: skip
        assert said in text


@pytest.mark.parametrize("name", ["clip", "vit", "vit_tiny_patch16_224", "hf-hub:nobody/nothing"])
def test_without_a_connection_the_message_says_so(no_hub, name: str) -> None:
    with pytest.raises(InputError) as error:
        load_encoder(name)
    assert "without a connection to the hub" in str(error.value)
    assert "gated" not in str(error.value)


def test_a_hub_that_does_not_answer_is_given_up_at_once(monkeypatch) -> None:
    from huggingface_hub import constants

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with hub_connection():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_a_gated_answer_of_the_hub_is_told_for_any_model() -> None:
    class GatedRepoError(OSError):
        pass

    error = weights_error("hf-hub:some/model", GatedRepoError("401 Client Error"))
    assert "accept the terms at https://huggingface.co/some/model" in str(error)


def test_unknown_names_list_the_forms() -> None:
    with pytest.raises(InputError, match=r"did you mean .*vit_tiny_patch16_224.*(.|\n)*open_clip:"):
        load_encoder("vit_tiny_patch16_22")
    with pytest.raises(InputError, match="other forms: clip, clip-l14"):
        load_encoder("some/thing")


@pytest.mark.parametrize("name", ["clip", "clip-l14", "vit"])
def test_known_timm_names_exist(name: str) -> None:
    assert timm.is_model_pretrained(KNOWN[name].source)


def test_a_projection_is_part_of_an_encoder_and_of_its_export(tmp_path) -> None:
    kwargs = TINY | {"num_classes": 7}
    encoder = load_encoder("random:vit_tiny_patch16_224", kwargs=kwargs)
    assert encoder.embed_dim == encoder(pixels()).shape[1] == 7
    saved = load_encoder(save_encoder(tmp_path / "e", encoder.model.state_dict(), encoder.spec))
    assert torch.equal(saved(pixels()), encoder(pixels()))
