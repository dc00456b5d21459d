from __future__ import annotations

import pytest
import timm
import torch

from cytoray.errors import InputError
from cytoray.finetune.adapters import (
    Adapter,
    adapt,
    adapter_state,
    load_adapter_state,
    merged_weights,
    parse_adapter,
)
from cytoray.models import load_encoder
from cytoray.models.lora import trainable_parameters


def images(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)


def shake(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in trainable_parameters(module).values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))


def test_forms() -> None:
    assert parse_adapter("linear") == Adapter(kind="linear")
    assert parse_adapter("full").name == "full"
    lora = Adapter(kind="lora", targets=("q", "v"), rank=2)
    assert parse_adapter("lora") == parse_adapter("lora:q,v:2") == lora
    assert parse_adapter("lora16").name == "lora-q.k.v.o-r16"
    other = parse_adapter("lora:q,mlp:8", alpha=2.0, dropout=0.0)
    assert (other.targets, other.rank, other.alpha, other.dropout) == (("q", "mlp"), 8, 2.0, 0.0)
    assert [parse_adapter(n).needs_pixels for n in ("linear", "lora:q:0", "full")] == [0, 1, 1]
    assert [parse_adapter(n).trains_encoder for n in ("linear", "lora:q:0", "lora")] == [0, 0, 1]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("lorra", r"unknown adapter 'lorra'; valid: linear, full, lora, lora16, lora:TARGETS:RANK"),
        ("lora:q,x:2", r"targets q,x: valid are q, k, v, o, mlp"),
        ("lora:q:-1", "rank -1 is negative"),
        ("lora:q", "unknown adapter"),
    ],
)
def test_bad_forms_list_the_valid_ones(form: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_adapter(form)


@pytest.mark.parametrize("form", ["linear", "lora:q,v:0", "lora", "lora:q,k,v,o,mlp:4", "full"])
def test_an_adapter_changes_nothing_until_it_is_trained(tiny_encoder, form: str) -> None:
    encoder = load_encoder(tiny_encoder)
    plain = encoder(images())
    adapted = adapt(encoder, parse_adapter(form))
    assert torch.allclose(adapted(images()), plain, atol=1e-6, rtol=0)
    trained = sum(p.numel() for p in trainable_parameters(adapted).values())
    width, mlp = 24, 96
    lora = {"lora": 2 * (2 * 2 * width), "lora:q,k,v,o,mlp:4": 4 * (8 * width + 2 * (width + mlp))}
    everything = sum(p.numel() for p in encoder.parameters())
    expected = {"linear": 0, "lora:q,v:0": 0, "full": everything}
    expected |= {name: 2 * count for name, count in lora.items()}  # two blocks
    assert trained == expected[form]
    assert all(p.requires_grad for p in encoder.parameters())  # the one given is left alone


@pytest.mark.parametrize("form", ["lora", "lora:q,k,v,o,mlp:4", "lora:mlp:1", "full"])
def test_merged_weights_give_what_the_adapter_gives(tiny_encoder, form: str) -> None:
    encoder = load_encoder(tiny_encoder)
    adapter = parse_adapter(form)
    adapted = adapt(encoder, adapter)
    shake(adapted)
    assert not torch.allclose(adapted(images()), encoder(images()), atol=1e-3)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, **encoder.spec.kwargs).eval()
    plain.load_state_dict(merged_weights(adapted))
    with torch.no_grad():
        merged = plain(encoder.prepare(images()))
        assert torch.allclose(merged, adapted(images()), atol=1e-5, rtol=0)
    again = adapt(encoder, adapter)
    load_adapter_state(again, adapter, adapter_state(adapted, adapter))
    assert torch.equal(again(images()), adapted(images()))


def test_mlp_is_refused_where_there_is_none(tiny_encoder) -> None:
    encoder = load_encoder(tiny_encoder)
    for block in encoder.model.blocks:  # type: ignore[union-attr]
        block.mlp = torch.nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(InputError, match="leave `mlp` out"):
        adapt(encoder, parse_adapter("lora:mlp:2"))
