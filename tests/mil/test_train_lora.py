import dataclasses

import numpy as np
import pytest
import timm
import torch
from torch import nn

from cytoray.errors import InputError
from cytoray.mil.config import MILConfig
from cytoray.mil.tiles import ArrayTileSource, embed_tiles, spread_indices
from cytoray.mil.train import predict
from cytoray.mil.train_lora import _LoraSession, adapt_encoder, backbone_of, train_lora
from cytoray.models.encoder import load_encoder, save_encoder
from cytoray.models.lora import load_lora_state, merge_lora, trainable_parameters

CONFIG = MILConfig(
    options={"hidden_dim": 16, "attention_dim": 8},
    lora_rank=2,
    lora_lr=1e-2,
    lr=3e-3,
    epochs=4,
    patience=0,
    batch_bags=4,
    tiles_per_bag=6,
    eval_tiles=9,
    batch_tiles=5,
    dropout=0.0,
    lora_dropout=0.0,
    warm_start_epochs=2,
    augment=False,
)


class TinyEncoder(nn.Module):
    """A small ViT over uint8 tiles."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.backbone = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            num_classes=0,
        )

    def forward(self, tiles):
        return self.backbone(tiles.permute(0, 3, 1, 2).float() / 127.5 - 1.0)


def make_slides(count=16, seed=0):
    """Slides of class 1 hold some tiles with a dark disc."""
    rng = np.random.default_rng(seed)
    tiles, labels = {}, []
    yy, xx = np.mgrid[:32, :32]
    disc = (yy - 16) ** 2 + (xx - 16) ** 2 < 60
    for index in range(count):
        pixels = rng.integers(150, 255, (int(rng.integers(5, 14)), 32, 32, 3)).astype(np.uint8)
        if index % 2:
            pixels[:3, disc] //= 4
        tiles[f"s{index}"] = pixels
        labels.append(index % 2)
    return ArrayTileSource(tiles), list(tiles), labels


@pytest.fixture(scope="module")
def trained():
    encoder = TinyEncoder().eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    source, ids, labels = make_slides()
    result = train_lora(CONFIG, encoder, source, ids[:10], labels[:10], ids[10:], labels[10:], 2)
    return encoder, before, source, ids, labels, result


def test_loss_falls_and_lora_moves(trained):
    *_, result = trained
    losses = [record["train_loss"] for record in result.history[1:]]
    assert losses[-1] < losses[0]
    assert [record["epoch"] for record in result.history] == [0, 1, 2, 3, 4]
    assert result.in_dim == 32
    assert set(result.lora_state) == {
        f"blocks.{block}.attn.qkv.{part}.{matrix}"
        for block in (0, 1)
        for part in "qv"
        for matrix in "AB"
    }


def test_the_encoder_given_is_not_changed(trained):
    encoder, before, *_ = trained
    after = encoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_only_lora_and_head_learn(trained):
    encoder, before, source, ids, labels, _ = trained
    session = _LoraSession(CONFIG, adapt_encoder(encoder, CONFIG), source, torch.device("cpu"))
    train_set = (ids[:10], np.array(labels[:10]))
    result = session.run(train_set, (ids[10:], np.array(labels[10:])), 2, None)
    assert result.history
    lora = 0
    for name, value in session.encoder.state_dict().items():
        if "lora_" in name:
            lora += int(bool(value.any())) if "lora_B" in name else 0
            continue
        plain = name.replace(".base_layer", "")
        if ".qkv." in plain:
            part = "qkv".index(plain.split(".qkv.")[1][0])
            original = before[plain.replace(f".qkv.{'qkv'[part]}.", ".qkv.")].chunk(3)[part]
        else:
            original = before[plain]
        assert torch.equal(value, original), name
    assert lora == 4
    assert all("lora_" in name for name in trainable_parameters(session.encoder))


def test_best_state_reproduces_the_validation_metrics(trained):
    encoder, _, source, ids, labels, result = trained
    adapted = adapt_encoder(encoder, CONFIG)
    load_lora_state(adapted.backbone, result.lora_state)
    bags = [
        embed_tiles(adapted, source, i, spread_indices(source.num_tiles(i), 9)) for i in ids[10:]
    ]
    probabilities = predict(result.build(), bags).probabilities
    accuracy = (probabilities.argmax(1) == np.array(labels[10:])).mean()
    assert accuracy == pytest.approx(result.val_metrics["accuracy"])
    record = next(r for r in result.history if r["epoch"] == result.best_epoch)
    assert record["val_auc"] == result.val_metrics["auc"]


def test_same_seed_same_result():
    source, ids, labels = make_slides(8)
    config = dataclasses.replace(CONFIG, epochs=1, lora_dropout=0.25, dropout=0.25, augment=True)
    runs = [
        train_lora(config, TinyEncoder(), source, ids[:4], labels[:4], ids[4:], labels[4:], 2)
        for _ in range(2)
    ]
    assert str(runs[0].history) == str(runs[1].history)


def test_checkpointing_gives_the_same_gradient_with_dropout_on():
    source, ids, _ = make_slides(4)
    gradients = []
    for checkpointing in (False, True):
        config = dataclasses.replace(CONFIG, gradient_checkpointing=checkpointing, lora_dropout=0.5)
        torch.manual_seed(0)
        adapted = adapt_encoder(TinyEncoder(), config)
        for parameter in trainable_parameters(adapted).values():
            nn.init.normal_(parameter, std=0.1)
        session = _LoraSession(config, adapted, source, torch.device("cpu"))
        torch.manual_seed(1)
        features = session.sample(ids, np.random.default_rng(0)).features
        features.square().sum().backward()
        gradients.append([p.grad for p in trainable_parameters(adapted).values()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert bool(a.any())


def test_the_packages_own_encoder_is_adapted_and_merged_back(tmp_path):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    encoder = load_encoder("vit_tiny_patch16_224", pretrained=False, kwargs=size)
    source, ids, labels = make_slides(8)
    config = dataclasses.replace(CONFIG, epochs=1, warm_start_epochs=0, options={})
    result = train_lora(config, encoder, source, ids[:4], labels[:4], ids[4:], labels[4:], 2)
    adapted = adapt_encoder(encoder, config)
    load_lora_state(backbone_of(adapted), result.lora_state)
    spec = dataclasses.replace(encoder.spec, img_px=32)
    merged = load_encoder(save_encoder(tmp_path / "e", merge_lora(backbone_of(adapted)), spec))
    tiles = torch.from_numpy(source.tiles["s0"])
    with torch.no_grad():
        assert torch.allclose(merged(tiles), adapted(tiles), atol=1e-5)
        assert not torch.equal(merged(tiles), encoder(tiles))


def test_rank_0_trains_the_head_only():
    source, ids, labels = make_slides(8)
    config = dataclasses.replace(CONFIG, lora_rank=0, epochs=1, warm_start_epochs=0)
    result = train_lora(config, TinyEncoder(), source, ids[:4], labels[:4], ids[4:], labels[4:], 2)
    assert result.lora_state == {}
    assert [record["epoch"] for record in result.history] == [1]


def test_several_tasks_with_missing_labels():
    source, ids, labels = make_slides(8)
    tasks = [(label, label if index % 3 else -1) for index, label in enumerate(labels)]
    config = dataclasses.replace(CONFIG, epochs=1, warm_start_epochs=1)
    result = train_lora(config, TinyEncoder(), source, ids, tasks, ids, tasks, (2, 2))
    assert result.num_classes == (2, 2)
    assert {"task0_auc", "task1_auc"} < set(result.val_metrics)
    assert result.lora_state


def test_sampled_bags_are_at_most_tiles_per_bag():
    source, ids, _ = make_slides(4)
    session = _LoraSession(
        CONFIG, adapt_encoder(TinyEncoder(), CONFIG), source, torch.device("cpu")
    )
    packed = session.sample(ids, np.random.default_rng(0))
    sizes = [min(6, source.num_tiles(slide_id)) for slide_id in ids]
    assert packed.offsets.diff().tolist() == sizes
    assert packed.features.requires_grad


def test_bad_input_is_named():
    source, ids, labels = make_slides(4)
    source.tiles["s1"] = source.tiles["s1"][:0]
    with pytest.raises(InputError, match="slide s1 has no tile"):
        train_lora(CONFIG, TinyEncoder(), source, ids, labels, ids, labels, 2)

    class Frozen(TinyEncoder):
        def forward(self, tiles):
            with torch.no_grad():
                return super().forward(tiles)

    source, ids, labels = make_slides(4)
    with pytest.raises(InputError, match="without gradient"):
        train_lora(CONFIG, Frozen(), source, ids, labels, ids, labels, 2)
    with pytest.raises(InputError, match="no timm model"):
        train_lora(CONFIG, nn.Linear(1, 1), source, ids, labels, ids, labels, 2)


def test_warm_start_takes_the_features_it_is_given():
    calls = []

    class Counting(ArrayTileSource):
        def __call__(self, slide_id, indices, rng):
            calls.append(slide_id)
            return super().__call__(slide_id, indices, rng)

    rng = np.random.default_rng(0)
    names = [f"s{i}" for i in range(6)]
    labels = [i % 2 for i in range(6)]
    encoder = TinyEncoder().eval()
    tiles = {name: rng.integers(0, 255, (3, 32, 32, 3), dtype=np.uint8) for name in names}
    with torch.no_grad():
        features = {name: encoder(torch.from_numpy(tiles[name])).numpy() for name in names}
    config = dataclasses.replace(CONFIG, epochs=1, batch_tiles=8)
    slides = (names[:4], labels[:4], names[4:], labels[4:], 2)
    given = train_lora(config, encoder, Counting(tiles), *slides, frozen_features=features)
    # one tile for the width, two validations of two slides, one epoch of four bags
    assert len(calls) == 1 + 2 * 2 + 4
    embedded = train_lora(config, encoder, Counting(tiles), *slides)
    assert given.history[0]["val_loss"] == pytest.approx(embedded.history[0]["val_loss"], abs=1e-4)
