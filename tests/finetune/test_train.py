from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cytoray.errors import InputError
from cytoray.finetune import (
    AdapterFacts,
    CellTrial,
    TrainConfig,
    draw_examples,
    export_encoder,
    load_classifier,
    parse_adapter,
    read_cells,
    save_adapter,
    split_cells,
    train_cells,
)
from cytoray.finetune.augment import random_crops
from cytoray.finetune.data import prepare_cells
from cytoray.finetune.train import batch_stream, class_weights, learning_rate
from cytoray.models import load_encoder

FAST = TrainConfig(
    steps_per_shot=4,
    epochs=3,
    warmup_steps=2,
    evaluations=2,
    augmentation="turns",
    precision="fp32",
)


@pytest.fixture(scope="module")
def data(labelled_cells, tmp_path_factory):
    made, _ = prepare_cells(read_cells(labelled_cells), [32], tmp_path_factory.mktemp("pixels"))
    return made


@pytest.fixture(scope="module")
def split(data):
    return split_cells(data.cells, val_fraction=0.2, test_fraction=0.3)


@pytest.fixture(scope="module")
def features(data, tiny_encoder):
    with torch.no_grad():
        return load_encoder(tiny_encoder)(torch.from_numpy(data.images(32)[np.arange(90)])).numpy()


def trial(adapter: str, **changes) -> CellTrial:
    values = {"shots": 4, "lr": 1e-2, "train": FAST}
    return CellTrial(encoder="tiny", adapter=parse_adapter(adapter), **(values | changes))


def train(made, data, split, inputs, encoder=None, **options):
    chosen = draw_examples(made, data.cells.labels, data.cells.groups, split.train)
    labels = data.cells.labels
    parts = (chosen, split.val, split.test)
    return train_cells(made, inputs, labels, *parts, 3, encoder=encoder, **options)


@pytest.mark.parametrize("shots", [1, 2, 8])
def test_shots_are_exact_seeded_and_of_many_groups(data, split, shots: int) -> None:
    labels, groups = data.cells.labels, data.cells.groups

    def draw(seed: int) -> np.ndarray:
        return draw_examples(trial("linear", shots=shots, seed=seed), labels, groups, split.train)

    chosen = draw(0)
    assert np.bincount(labels[chosen]).tolist() == [shots] * 3
    assert len(set(chosen.tolist())) == 3 * shots
    assert set(chosen.tolist()) <= set(split.train.tolist())
    there = min(len(set(groups[split.train][labels[split.train] == c])) for c in range(3))
    for index in range(3):
        assert len(set(groups[chosen][labels[chosen] == index])) >= min(shots, there)
    np.testing.assert_array_equal(chosen, draw(0))
    assert chosen.tolist() != draw(1).tolist()


def test_shares_are_exact_and_nested(data, split) -> None:
    labels, groups = data.cells.labels, data.cells.groups
    drawn = [
        draw_examples(trial("linear", shots=0, share=s), labels, groups, split.train)
        for s in (0.05, 0.5, 1.0)
    ]
    assert len(drawn[2]) == len(split.train)
    assert set(drawn[0].tolist()) <= set(drawn[1].tolist()) <= set(drawn[2].tolist())
    assert len(drawn[0]) == 3
    with pytest.raises(InputError, match=r"40 shots cannot be drawn(.|\n)*class 0 has"):
        draw_examples(trial("linear", shots=40), labels, groups, split.train)


def test_a_linear_head_learns_from_features_that_tell_the_classes(data, split) -> None:
    easy = np.eye(3, dtype=np.float32)[data.cells.labels]
    made = train(trial("linear", lr=0.1, shots=8), data, split, easy)
    assert made.val["accuracy"] == 1.0
    assert (made.probabilities.argmax(1) == data.cells.labels[split.test]).all()
    np.testing.assert_allclose(made.probabilities.sum(1), 1.0, atol=1e-6)
    assert made.num_trained == 3 * 3 + 3
    assert [record["step"] for record in made.history] == [17, 34]
    assert made.adapter_state == {}


@pytest.mark.parametrize("form", ["lora", "full", "lora:q,v:0"])
def test_adapted_encoders_learn_and_the_given_one_is_left(data, split, tiny_encoder, form) -> None:
    encoder = load_encoder(tiny_encoder)
    before = encoder.encoder_id
    made = train(trial(form), data, split, data.images(32), encoder)
    again = train(trial(form), data, split, data.images(32), encoder)
    np.testing.assert_array_equal(made.probabilities, again.probabilities)
    assert load_encoder(tiny_encoder).encoder_id == before
    del encoder.encoder_id
    assert encoder.encoder_id == before
    assert np.isfinite(made.probabilities).all()
    changed = {name: value.abs().sum() > 0 for name, value in made.adapter_state.items()}
    if form == "lora":
        assert set(changed) == {
            f"blocks.{i}.attn.qkv.{t}.{m}" for i in range(2) for t in "qv" for m in "AB"
        }
        assert all(changed.values())  # B has left zero
    if form == "lora:q,v:0":
        assert changed == {}


def test_best_keeps_the_best_state_and_last_the_last(data, split, features) -> None:
    records: list[dict] = []
    config = TrainConfig(steps_per_shot=30, warmup_steps=0, evaluations=6)
    made = trial("linear", lr=3.0, train=config)
    best = train(made, data, split, features, on_evaluation=records.append)
    assert records == best.history
    ranks = [(r["val_accuracy"], -r["val_loss"]) for r in records]
    assert best.best_step == records[ranks.index(max(ranks))]["step"]
    assert best.val["accuracy"] == max(ranks)[0]
    last = train(replace(made, train=replace(config, select="last")), data, split, features)
    assert last.best_step == 120


def test_a_loss_that_is_not_finite_is_said(data, split, features) -> None:
    with pytest.raises(InputError, match="not finite at step"):
        train(trial("linear"), data, split, features * np.float32(np.inf))


def test_the_learning_rate_warms_up_and_falls_to_its_end() -> None:
    config = TrainConfig(warmup_steps=10, min_lr=1e-3)
    rates = [learning_rate(step, 60, 0.1, config) for step in range(60)]
    np.testing.assert_allclose(rates[:10], 0.1 * np.arange(1, 11) / 10)
    assert rates[10] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    middle = 1e-3 + 0.099 * 0.5 * (1 + math.cos(math.pi * 25 / 50))
    assert rates[35] == pytest.approx(middle)
    assert rates[59] == pytest.approx(1e-3, rel=0.2)


def test_steps() -> None:
    config = TrainConfig(steps_per_shot=100, warmup_steps=50, epochs=20, batch=32)
    assert config.num_steps(80, 16) == 1650
    assert config.num_steps(100, 0) == 50 + 20 * 4


def test_batches_use_every_image_once_a_round() -> None:
    stream = batch_stream(np.arange(10), 4, np.random.default_rng(0))
    rounds = [np.concatenate([next(stream) for _ in range(3)]) for _ in range(2)]
    assert all(sorted(seen.tolist()) == list(range(10)) for seen in rounds)
    assert rounds[0].tolist() != rounds[1].tolist()


def test_class_weights() -> None:
    weights = class_weights(np.array([0, 0, 0, 1]), 2, True)
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.5]))
    assert class_weights(np.array([0, 1]), 2, False).tolist() == [1, 1]


def test_random_crops_stay_inside_and_mirror() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).expand(200, 32, 32) * 8
    made = random_crops(ramp[..., None].expand(-1, -1, -1, 3), np.random.default_rng(0))
    assert made.shape == (200, 3, 32, 32)
    assert made.min() >= 0
    assert made.max() <= 1
    slope = (made[:, 0, 0, -1] - made[:, 0, 0, 0]).sign()
    assert 60 < (slope > 0).sum() < 140
    width = (made[:, 0, 0, -1] - made[:, 0, 0, 0]).abs() / (248 / 255) * 31 / 32
    assert 0.2 < width.min() < 0.45
    assert width.max() > 0.9


@pytest.mark.parametrize("form", ["linear", "lora", "full"])
def test_a_saved_adapter_answers_as_the_trained_one(
    data, split, features, tiny_encoder, tmp_path, form
) -> None:
    encoder = load_encoder(tiny_encoder)
    inputs = features if form == "linear" else data.images(32)
    made = train(trial(form), data, split, inputs, encoder)
    facts = AdapterFacts(
        encoder=str(tiny_encoder),
        encoder_id=encoder.encoder_id,
        adapter=parse_adapter(form),
        classes=data.cells.classes,
        facts={"val": made.val},
    )
    folder = save_adapter(tmp_path / "adapter", made, facts)
    loaded = load_classifier(folder)
    answers = loaded.probabilities(data.images(32), split.test, precision="fp32")
    np.testing.assert_allclose(answers, made.probabilities, atol=1e-5)
    exported = load_encoder(export_encoder(tmp_path / "encoder", loaded))
    pixels = torch.from_numpy(data.images(32)[split.test])
    with torch.no_grad():
        logits = loaded.head(exported(pixels))
    np.testing.assert_allclose(logits.softmax(1).numpy(), answers, atol=1e-5)
    if form == "lora":
        assert (folder / "adapter.safetensors").stat().st_size < 10_000
    with pytest.raises(InputError, match="belongs to encoder"):
        load_classifier(folder, load_encoder("random:vit_tiny_patch16_224", kwargs={"depth": 1}))
    (folder / "adapter.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="are not those of"):
        load_classifier(folder)


def test_bad_settings_are_listed_together() -> None:
    with pytest.raises(InputError) as error:
        TrainConfig(batch=0, augmentation="blur", select="first", precision="fp8")
    assert len(error.value.problems) == 4
    assert "augmentation 'blur' is none of none, turns, crops" in str(error.value)
