from __future__ import annotations

import pytest
import torch

from cytoray.models import load_encoder, use_sr
from cytoray.models.attention_maps import attention_of_images

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
)
def test_it_is_the_softmax_of_the_last_block(name: str) -> None:
    encoder = load_encoder(f"random:{name}", kwargs=KWARGS)
    encoder.model.blocks[-1].attn.fused_attn = False  # type: ignore[union-attr,index]
    seen = []
    drop = encoder.model.blocks[-1].attn.attn_drop  # type: ignore[union-attr,index]
    drop.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    maps = attention_of_images(encoder, pixels())
    assert maps is not None
    assert maps.shape == (3, 4, 4)
    prefix = int(encoder.model.num_prefix_tokens)  # type: ignore[arg-type]
    row = seen[0][:, :, 0, prefix:].mean(1)
    expected = (row / row.sum(1, keepdim=True)).reshape(3, 4, 4)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(3))


def test_sparse_attention_with_all_keys_equals_the_plain_one_and_few_keys_are_few() -> None:
    encoder = load_encoder("random:vit_tiny_patch16_224", kwargs=KWARGS)
    plain = attention_of_images(encoder, pixels())
    use_sr(encoder.model, top_h=17, irpe=True, sparse=True)
    assert plain is not None
    all_keys = attention_of_images(encoder, pixels())
    assert all_keys is not None
    torch.testing.assert_close(all_keys, plain)
    sparse = load_encoder("random:vit_tiny_patch16_224", kwargs=KWARGS)
    use_sr(sparse.model, top_h=3, irpe=False, sparse=True)
    maps = attention_of_images(sparse, pixels())
    assert maps is not None
    assert ((maps > 0).sum((1, 2)) <= 6).all()  # 3 keys in each of 2 heads


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_models_without_it_have_none(name: str) -> None:
    encoder = load_encoder(f"random:{name}")
    assert attention_of_images(encoder, pixels()) is None
