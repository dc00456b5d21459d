from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import tyro
import yaml

from cytoray.config import check_numbers, from_plain, to_plain
from cytoray.errors import InputError
from cytoray.finetune import Columns, TrainConfig
from cytoray.mil import MILConfig
from cytoray.synthetic import SynthConfig
from cytoray.training import BackboneConfig, PretrainConfig
from pipelines import embed, evaluate, finetune, index, pretrain, quickstart, synth, tune
from pipelines.runs import NAMED


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True, kw_only=True)
class Inner:
    size_px: int = 3
    share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    path: Path
    inner: Inner = field(default_factory=Inner)
    pair: tuple[float, float] = (0.5, 1.0)
    names: tuple[str, ...] = ()
    cpus: float | None = None
    options: dict[str, int | str] = field(default_factory=dict)
    mode: Literal["a", "b"] = "a"
    strict: bool = False


def through_yaml(config: Any) -> Any:
    text = yaml.safe_dump(to_plain(config), sort_keys=False)
    return from_plain(type(config), yaml.safe_load(text))


@pytest.mark.parametrize(
    "config",
    [
        index.Config(manifest="m.csv", out=Path("o"), magnification=20),
        pretrain.Config(
            index=Path("i"),
            out=Path("o"),
            ssl=PretrainConfig(
                backbone=BackboneConfig(kwargs={"depth": 2, "init_values": 1e-5, "qkv_bias": False})
            ),
            epochs=0.5,
            splits=("train", "val"),
            workers=2,
            use_gpu=False,
        ),
        embed.Config(index=Path("i"), encoder="vit_tiny_patch16_224", out=Path("o")),
        tune.Config(
            bags=(Path("b"),),
            index=Path("i"),
            encoder=("e",),
            out=Path("o"),
            lrs=(1e-5, 1),
            mil=MILConfig(options={"hidden_dim": 8}, lora_targets=("q",)),
        ),
        finetune.Config(
            cells=Path("c"),
            out=Path("o"),
            encoders=("uni",),
            lrs=(1e-5, 1),
            train=TrainConfig(balanced=True),
            columns=Columns(group_pattern="^(a)"),
            gpus_per_trial=0.5,
        ),
        evaluate.Config(out=Path("o"), bags=(Path("a"), Path("b")), labels=Path("l")),
        synth.Config(out=Path("o"), slides=SynthConfig(slides_per_patient=(2, 3))),
        quickstart.Config(out=Path("o")),
    ],
    ids=lambda config: type(config).__module__,
)
def test_a_written_config_runs_again(config: Any) -> None:
    assert through_yaml(config) == config


def test_every_value_is_plain() -> None:
    values = {"colour": Colour.RED, 1: (Path("a"), [Inner()])}
    assert to_plain(values) == {
        "colour": "red",
        "1": ["a", [{"size_px": 3, "share": 0.5}]],
    }


def test_named_runs_can_be_written_once_their_paths_are_given() -> None:
    for job, runs in NAMED.items():
        for name, config in runs.items():
            source = "cells" if job == "finetune" else "index"
            plain = to_plain(config) | {source: "i", "out": "o"}
            missing = {source: tyro.MISSING, "out": tyro.MISSING}
            if job == "tune":
                plain["bags"], missing["bags"] = ["b"], config.bags
            assert getattr(config, source) is tyro.MISSING, (job, name)
            again = from_plain(type(config), yaml.safe_load(yaml.safe_dump(plain)))
            assert dataclasses.replace(again, **missing) == config


def test_left_out_fields_keep_their_defaults() -> None:
    config = from_plain(Outer, {"path": "x", "inner": {"size_px": 9}, "pair": [1, 2]})
    assert config == Outer(path=Path("x"), inner=Inner(size_px=9), pair=(1.0, 2.0))
    assert isinstance(config.pair[0], float)


def test_numbers_yaml_takes_for_text() -> None:
    """YAML 1.1 reads 1e-5 as a string."""
    assert from_plain(Inner, yaml.safe_load("share: 1e-5")).share == 1e-5


def test_all_wrong_names_at_once() -> None:
    with pytest.raises(InputError) as caught:
        from_plain(Outer, {"pth": "x", "strickt": True})
    problems = caught.value.problems
    assert [p.split(" ")[0] for p in problems] == ["pth", "strickt", "path"]
    assert "valid: path, inner, pair" in problems[0]
    assert problems[2] == "path is missing"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"size": 1}}, r"inner\.size is not a field; valid: size_px, share"),
        ({"inner": {"size_px": "three"}}, r"inner\.size_px: 'three' is not int"),
        ({"inner": {"size_px": 2.5}}, r"inner\.size_px: 2\.5 is not int"),
        ({"inner": {"share": "half"}}, r"inner\.share: 'half' is not a number"),
        ({"inner": {"share": [1]}}, r"inner\.share: \[1\] is not a number"),
        ({"inner": 4}, r"inner: 4 does not hold `name: value` lines"),
        ({"inner": None}, r"inner: None does not hold `name: value` lines"),
        ({"strict": "yes"}, r"strict: 'yes' is not bool"),
        ({"names": "train"}, r"names: 'train' is not a list"),
        ({"names": ["train", 1]}, r"names: 1 is not str"),
        ({"pair": [1]}, r"pair: \[1\] must have 2 values"),
        ({"pair": [1, 2, 3]}, r"pair: \[1, 2, 3\] must have 2 values"),
        ({"cpus": "two"}, r"cpus: 'two' is not a number"),
        ({"path": 3}, r"path: 3 is not a path"),
        ({"path": None}, r"path: None is not a path"),
        ({"mode": "c"}, r"mode: 'c' is none of a, b"),
        ({"options": [1]}, r"options: \[1\] does not hold `name: value` lines"),
    ],
)
def test_a_value_that_does_not_fit_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_plain(Outer, {"path": "x"} | values)


def test_numbers_below_zero_are_refused_all_at_once() -> None:
    config = Outer(
        path=Path("x"),
        inner=Inner(size_px=-3, share=float("nan")),
        pair=(0.5, -1.0),
        cpus=None,
        options={"shift": -1},
    )
    with pytest.raises(InputError) as caught:
        check_numbers(config)
    assert caught.value.problems == [
        "--inner.size-px must be 0 or more, not -3",
        "--inner.share must be 0 or more, not nan",
        "--pair must be 0 or more, not -1",
    ]
    check_numbers(Outer(path=Path("x"), cpus=float("inf")))


@pytest.mark.parametrize("name", sorted(NAMED))
def test_named_runs_have_no_number_below_zero(name: str) -> None:
    for config in NAMED[name].values():
        check_numbers(config)
