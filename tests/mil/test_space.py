from __future__ import annotations

import math

import pytest

from cytoray.errors import InputError
from cytoray.mil import MILConfig
from cytoray.mil.space import (
    Span,
    candidates_of,
    changed_fields,
    configs_of,
    draws,
    flat_config,
    grid,
    read_axes,
)

BASE = MILConfig(epochs=7)


def axes_of(tmp_path, text: str):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return read_axes(path)


def test_a_file_of_lists_and_ranges(tmp_path) -> None:
    axes = axes_of(
        tmp_path,
        "aggregator: [mean, abmil]\nlr: {min: 1e-5, max: 1e-3, log: true}\n"
        "weight_decay: [1e-4]\nlora_rank: {min: 1, max: 8}\nabmil.options.hidden_dim: [8, 16]\n",
    )
    assert axes["lr"] == Span(1e-5, 1e-3, log=True)
    assert axes["lora_rank"] == Span(1, 8, whole=True)
    assert axes["weight_decay"] == (1e-4,)
    assert axes["abmil.options.hidden_dim"] == (8, 16)


def test_every_problem_of_a_file_is_told_at_once(tmp_path) -> None:
    with pytest.raises(InputError) as caught:
        axes_of(
            tmp_path,
            "lrr: [1]\nlr: {min: 1}\nweight_decay: []\ndropout: {min: 0.5, max: 0.1}\n"
            "lora_lr: {min: 0, max: 1, log: true}\n",
        )
    said = str(caught.value)
    assert "lrr is not a field of a trial; valid: aggregator" in said
    assert "lr: a range needs min and max" in said
    assert "weight_decay has no value" in said
    assert "dropout: min must be below max" in said
    assert "lora_lr: a range with log: true must be above 0" in said
    with pytest.raises(InputError, match="cannot read the search space"):
        read_axes(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match=r"must hold `name: \[values\]` lines"):
        axes_of(tmp_path, "- lr\n")
    with pytest.raises(InputError, match="is not YAML"):
        axes_of(tmp_path, "lr: [1")


def test_a_grid_is_every_combination_and_has_no_ranges() -> None:
    points = grid({"aggregator": ("mean", "max"), "lr": (1e-3, 1e-4, 1e-5)})
    assert len(points) == 6
    assert points[0] == {"aggregator": "mean", "lr": 1e-3}
    with pytest.raises(InputError, match="lr is a range"):
        grid({"lr": Span(0.1, 1)})


def test_draws_are_seeded_distinct_and_in_range() -> None:
    axes = {"aggregator": ("mean", "max"), "lr": Span(1e-5, 1e-3, log=True),
            "lora_rank": Span(1, 4, whole=True)}  # fmt: skip
    points = draws(axes, 40, seed=3)
    assert points == draws(axes, 40, seed=3)
    assert draws(axes, 10, seed=3) == points[:10]
    assert points != draws(axes, 40, seed=4)
    assert len({str(point) for point in points}) == 40
    assert all(1e-5 <= point["lr"] <= 1e-3 for point in points)
    below = sum(point["lr"] < 1e-4 for point in points)
    assert 10 < below < 30, "uniform in the logarithm"
    assert {point["lora_rank"] for point in points} == {1, 2, 3, 4}
    assert len(draws({"lr": (1.0, 2.0, 3.0)}, 10, seed=0)) == 3


def test_points_become_trials_once_each() -> None:
    points = grid({"aggregator": ("mean", "abmil"), "lora_rank": (0, 4),
                   "abmil.options.hidden_dim": (8, 16)})  # fmt: skip
    configs = configs_of(points, BASE, lora_epochs=2)
    assert len(configs) == 6, "an axis of abmil alone does not double the others"
    adapted = [config for config in configs if config.lora_rank]
    assert {(c.epochs, c.warm_start_epochs) for c in adapted} == {(2, 7)}
    assert {c.epochs for c in configs if not c.lora_rank} == {7}
    assert changed_fields(configs) == ["aggregator", "epochs", "lora_rank",
                                       "options.hidden_dim"]  # fmt: skip
    assert flat_config(configs[-1])["options.hidden_dim"] == 16


def test_trials_without_lora_do_not_differ_by_how_an_encoder_is_adapted() -> None:
    points = grid({"lora_rank": (0, 4), "lora_blocks": (0, 2), "lora_lr": (1e-3, 1e-4)})
    configs = configs_of(points, BASE)
    found = sorted((c.lora_rank, c.lora_blocks, c.lora_lr) for c in configs)
    assert found[0] == (0, BASE.lora_blocks, BASE.lora_lr)
    assert found[1:] == [(4, b, lr) for b in (0, 2) for lr in (1e-4, 1e-3)]
    assert changed_fields(configs) == ["epochs", "lora_rank", "lora_blocks", "lora_lr"]
    alike = configs_of(grid({"lora_rank": (0, 4), "lora_blocks": (2,)}), BASE)
    assert changed_fields(alike) == ["epochs", "lora_rank"], "blocks of a rank 0 do not count"


def test_published_settings_are_each_aggregators_own() -> None:
    configs = configs_of(grid({"aggregator": ("abmil", "dsmil")}), BASE, published=True)
    for config in configs:
        assert config.lr == MILConfig.published(config.aggregator).lr
        assert config.epochs == 7
    [given] = configs_of([{"aggregator": "dsmil", "lr": 0.5}], BASE, published=True)
    assert math.isclose(given.lr, 0.5)


def test_impossible_trials_are_named_together() -> None:
    with pytest.raises(InputError) as caught:
        configs_of([{"lr": -1.0}, {"dropout": 2.0}, {"epochs": "many"}], BASE)
    assert len(caught.value.problems) == 3


def test_keys_do_not_hang_on_the_order_but_on_the_encoder() -> None:
    configs = configs_of(grid({"aggregator": ("mean", "abmil")}), BASE)
    forward = {c.key for c in candidates_of(configs, ["a", "b"])}
    backward = {c.key for c in candidates_of(configs[::-1], ["b", "a"])}
    assert forward == backward
    assert len(forward) == 4
