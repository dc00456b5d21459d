import dataclasses

import numpy as np
import pytest
import torch

from cytoray.mil.config import MILConfig
from cytoray.mil.prefix import FrozenPrefix, compute_prefix
from cytoray.mil.tiles import ArrayTileSource, embed_tiles
from cytoray.mil.train_lora import train_lora
from cytoray.models.encoder import Encoder, load_encoder

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
CONFIG = MILConfig(
    options={"hidden_dim": 16, "attention_dim": 8}, lora_rank=2, lora_blocks=1, lora_lr=1e-2,
    lr=3e-3, epochs=3, patience=0, batch_bags=4, tiles_per_bag=6, eval_tiles=9, batch_tiles=5,
    warm_start_epochs=1, augment=False,
)  # fmt: skip


class CountingSource(ArrayTileSource):
    """Counts the tiles it is asked for."""

    count = 0

    def __call__(self, slide_id, indices, rng):
        self.count += len(indices)
        return super().__call__(slide_id, indices, rng)


@pytest.fixture
def encoder() -> Encoder:
    return load_encoder("vit_tiny_patch16_224", pretrained=False, kwargs=SMALL)


def slides(count=10) -> tuple[CountingSource, list[str], list[int]]:
    rng = np.random.default_rng(0)
    tiles = {}
    for index in range(count):
        size = (int(rng.integers(5, 14)), 32, 32, 3)
        tiles[f"s{index}"] = rng.integers(90 * (index % 2), 255, size).astype(np.uint8)
    return CountingSource(tiles), list(tiles), [index % 2 for index in range(count)]


def made_prefix(encoder, source, ids, depth, dtype) -> FrozenPrefix:
    tiles = {name: np.arange(source.num_tiles(name)) for name in ids}
    arrays = {
        name: compute_prefix(encoder, source, name, tiles[name], depth, batch_tiles=4, dtype=dtype)
        for name in ids
    }
    source.count = 0
    return FrozenPrefix(depth, tiles, lambda name: arrays[name])


@pytest.mark.parametrize("blocks", [1, 2, 0])
def test_training_is_the_same_with_the_prefix_as_without(encoder, blocks: int) -> None:
    config = dataclasses.replace(CONFIG, lora_blocks=blocks, gradient_checkpointing=blocks == 2)
    source, ids, labels = slides()
    parts = (ids[:6], labels[:6], ids[6:], labels[6:], 2)
    plain = train_lora(config, encoder, source, *parts)
    assert source.count > 0
    depth = 3 - blocks if blocks else 0
    for dtype, tolerance in ((np.float32, 1e-5), (np.float16, 2e-3)):
        prefix = made_prefix(encoder, source, ids, depth, dtype)
        shared = train_lora(config, encoder, source, *parts, prefix=prefix)
        assert source.count == 0, "no tile was read again"
        for before, after in zip(plain.history, shared.history, strict=True):
            for name in ("train_loss", "val_loss"):
                assert after[name] == pytest.approx(before[name], abs=tolerance, nan_ok=True)
        if dtype is np.float16:  # AdamW's first steps go by the sign of a gradient, however small
            continue
        states = ((plain.lora_state, shared.lora_state), (plain.state_dict, shared.state_dict))
        for before, after in states:
            assert list(before) == list(after)
            for name, value in before.items():
                assert torch.allclose(after[name], value, atol=tolerance), name


def test_only_the_last_blocks_are_adapted(encoder) -> None:
    source, ids, labels = slides()
    config = dataclasses.replace(CONFIG, epochs=1)
    result = train_lora(config, encoder, source, ids, labels, ids, labels, 2)
    names = {f"blocks.2.attn.qkv.{part}.{matrix}" for part in "qv" for matrix in "AB"}
    assert set(result.lora_state) == names


def test_turned_training_tiles_are_read_and_validation_tiles_are_not(encoder) -> None:
    source, ids, labels = slides()
    config = dataclasses.replace(CONFIG, augment=True, epochs=1, warm_start_epochs=0)
    prefix = made_prefix(encoder, source, ids, 2, np.float32)
    train_lora(config, encoder, source, ids[:6], labels[:6], ids[6:], labels[6:], 2, prefix=prefix)
    assert source.count == sum(min(6, source.num_tiles(name)) for name in ids[:6])


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean", "model"])
@pytest.mark.parametrize("sr", [False, True])
def test_both_parts_together_are_the_encoder(encoder, pooling: str, sr: bool) -> None:
    if sr:
        from cytoray.models import use_sr

        use_sr(encoder.model, top_h=5)
        for name, table in encoder.model.named_parameters():
            if name.rsplit(".", 1)[-1].startswith("rel_"):
                torch.nn.init.normal_(table, std=0.5, generator=torch.Generator().manual_seed(1))
    spec = dataclasses.replace(encoder.spec, pooling=pooling)
    encoder = Encoder(encoder.model, spec).eval()
    source, ids, _ = slides(1)
    every = np.arange(source.num_tiles("s0"))
    whole = embed_tiles(encoder, source, "s0", every)
    for depth in range(4):
        prefix = made_prefix(encoder, source, ids, depth, np.float32)
        assert torch.allclose(embed_tiles(encoder, source, "s0", every, prefix=prefix), whole,
                              atol=1e-5)  # fmt: skip
        assert source.count == 0


def test_tiles_that_are_not_held_are_not_invented() -> None:
    arrays = {"a": np.arange(3.0)[:, None, None]}
    prefix = FrozenPrefix(0, {"a": np.array([1, 4, 9]), "b": np.array([], int)}, arrays.__getitem__)
    assert prefix("a", np.array([4, 9])).ravel().tolist() == [1.0, 2.0]
    assert prefix("a", np.array([9, 1])).ravel().tolist() == [2.0, 0.0]
    assert prefix("a", np.array([4, 10])) is None
    assert prefix("a", np.array([0])) is None
    assert prefix("b", np.array([0])) is None
    assert prefix("c", np.array([0])) is None


def test_activations_beyond_half_precision_are_not_kept(encoder) -> None:
    source, _, _ = slides(1)
    with torch.no_grad():
        encoder.model.pos_embed.fill_(1e5)
    assert compute_prefix(encoder, source, "s0", np.arange(2), 0) is None
    assert compute_prefix(encoder, source, "s0", np.arange(2), 0, dtype=np.float32) is not None
