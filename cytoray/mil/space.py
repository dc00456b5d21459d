"""What a search tries: every combination of listed values, or seeded draws from lists and ranges.

An axis is a field of `MILConfig` (`lr`), one of an aggregator's options (`options.hidden_dim`), or
either for one aggregator alone (`transmil.lr`, `unicas.options.depth`); a point has one value of
each axis. In a file:

    aggregator: [abmil, transmil]
    lr: {min: 1e-5, max: 1e-3, log: true}
    unicas.options.depth: [2, 8]
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cytoray.config import from_plain, to_plain
from cytoray.errors import InputError, raise_problems
from cytoray.mil.aggregators import AGGREGATORS
from cytoray.mil.config import MILConfig

FIELDS = tuple(entry.name for entry in fields(MILConfig) if entry.name != "options")
_LORA_FIELDS = tuple(name for name in FIELDS if name.startswith("lora_"))
_LORA_ONLY = {*_LORA_FIELDS, "tiles_per_bag", "eval_tiles", "warm_start_epochs", "augment"} - {
    "lora_rank"
}
_SPAN_KEYS = {"min", "max", "log"}


@dataclass(frozen=True)
class Span:
    """A range to draw from: uniform, or uniform in the logarithm; whole numbers if `whole`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, rng: np.random.Generator) -> float | int:
        """One value, both ends possible."""
        if self.whole and not self.log:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = float(rng.uniform(low, high))
        value = min(max(math.exp(value) if self.log else value, self.low), self.high)
        return round(value) if self.whole else float(f"{value:.4g}")


Axis = tuple[Any, ...] | Span
Point = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One configuration of the search.

    Attributes:
        key: stable name, made of what it is.
        encoder: which of the feature sets it uses.
        config: the trial.
    """

    key: str
    encoder: int
    config: MILConfig


def read_axes(path: str | Path) -> dict[str, Axis]:
    """Axes from a YAML file.

    Raises:
        InputError: no such file, not `name: values` lines, an unknown field, an empty list, or a
            range that is none; all at once.
    """
    try:
        plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the search space {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"the search space {path} is not YAML: {error}") from None
    if not isinstance(plain, dict) or not plain:
        raise InputError(f"the search space {path} must hold `name: [values]` lines")
    axes, problems = {}, []
    for name, given in plain.items():
        try:
            axes[str(name)] = _axis(str(name), given)
        except InputError as error:
            problems.append(str(error))
    raise_problems(f"the search space {path} cannot be used:", problems)
    return axes


def _axis(name: str, given: Any) -> Axis:
    owner, _, rest = name.partition(".")
    field = rest if owner in AGGREGATORS else name
    if field not in FIELDS and not field.startswith("options."):
        raise InputError(
            f"{name} is not a field of a trial; valid: {', '.join(FIELDS)}, options.<name>, or "
            "<aggregator>.<field>"
        )
    if isinstance(given, dict):
        return _span(name, given)
    values = given if isinstance(given, list) else [given]
    if not values:
        raise InputError(f"{name} has no value")
    return tuple(tuple(v) if isinstance(v, list) else _number(v) for v in values)


def _span(name: str, given: Mapping[str, Any]) -> Span:
    if not {"min", "max"} <= set(given) <= _SPAN_KEYS:
        raise InputError(f"{name}: a range needs min and max (and may say log: true)")
    low, high = (_number(given[key]) for key in ("min", "max"))
    log = bool(given.get("log", False))
    if not all(isinstance(v, (int, float)) for v in (low, high)) or not low < high:
        raise InputError(f"{name}: min must be below max, both numbers")
    if log and low <= 0:
        raise InputError(f"{name}: a range with log: true must be above 0")
    return Span(low, high, log, isinstance(low, int) and isinstance(high, int))


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def grid(axes: Mapping[str, Axis]) -> list[Point]:
    """Every combination, the last axis changing fastest.

    Raises:
        InputError: an axis is a range.
    """
    spans = [f"{name} is a range" for name, axis in axes.items() if isinstance(axis, Span)]
    raise_problems("a grid needs lists of values (or search at random):", spans)
    columns = [list(axis) for axis in axes.values() if not isinstance(axis, Span)]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*columns)]


def draws(axes: Mapping[str, Axis], count: int, seed: int) -> list[Point]:
    """`count` different points at random; all of them where there are no more.

    Args:
        axes: lists and ranges.
        count: points.
        seed: the same seed gives the same points; more points begin with the same.
    """
    lists_only = not any(isinstance(axis, Span) for axis in axes.values())
    if lists_only and math.prod(len(axis) for axis in axes.values()) <= count:  # type: ignore[arg-type]
        return grid(axes)
    rng = np.random.default_rng(seed)
    points: dict[str, Point] = {}
    for _ in range(100 * count):
        point = {
            name: axis.draw(rng) if isinstance(axis, Span) else axis[rng.integers(len(axis))]
            for name, axis in axes.items()
        }
        points.setdefault(json.dumps(point, default=str), point)
        if len(points) == count:
            break
    return list(points.values())


def configs_of(
    points: Iterable[Point], base: MILConfig, *, published: bool = False, lora_epochs: int = 10
) -> list[MILConfig]:
    """The trials of the points, each once.

    A trial with a LoRA rank first trains its head for the base's epochs on frozen features, then
    `lora_epochs` end to end.

    Args:
        points: of `grid` or `draws`.
        base: what the points leave open.
        published: start from the settings each aggregator was published with.
        lora_epochs: epochs of trials with a LoRA rank, unless the point says.

    Raises:
        InputError: values no trial can have, all at once.
    """
    made: dict[str, MILConfig] = {}
    problems: dict[str, None] = {}
    for point in points:
        try:
            config = _config(point, base, published, lora_epochs)
            made.setdefault(json.dumps(to_plain(config), sort_keys=True), config)
        except InputError as error:
            problems |= dict.fromkeys(error.problems or [str(error)])
    raise_problems("these trials cannot be run:", list(problems))
    return list(made.values())


def _config(point: Point, base: MILConfig, published: bool, lora_epochs: int) -> MILConfig:
    aggregator = str(point.get("aggregator", base.aggregator))
    values: dict[str, Any] = {}
    if published and aggregator in AGGREGATORS:
        values |= dict(AGGREGATORS[aggregator].optimizer_defaults)
    own = {
        name.partition(".")[2]: value
        for name, value in point.items()
        if name.partition(".")[0] == aggregator
    }
    common = {k: v for k, v in point.items() if k.partition(".")[0] not in AGGREGATORS}
    values |= {"aggregator": aggregator} | common | own
    chosen = {k.partition(".")[2]: values.pop(k) for k in list(values) if k.startswith("options.")}
    values["options"] = {**base.options, **chosen}
    if values.get("lora_rank", base.lora_rank) > 0:
        epochs = values.get("epochs", base.epochs)
        values = {"warm_start_epochs": epochs} | values | {"epochs": lora_epochs}
    else:  # how an encoder would be adapted makes no other trial
        values = {k: v for k, v in values.items() if k == "lora_rank" or k not in _LORA_FIELDS}
    return from_plain(MILConfig, to_plain(base) | to_plain(values))


def candidates_of(configs: Sequence[MILConfig], encoder_ids: Sequence[str]) -> list[Candidate]:
    """Every config on every encoder's features, with keys that do not depend on the order."""
    made = []
    for place, encoder_id in enumerate(encoder_ids):
        for config in configs:
            text = json.dumps([to_plain(config), encoder_id], sort_keys=True)
            digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
            key = f"{config.aggregator}-r{config.lora_rank}-lr{config.lr:g}-{digest}"
            made.append(Candidate(key, place, config))
    return made


def changed_fields(configs: Sequence[MILConfig]) -> list[str]:
    """Fields in which the configs differ, flat (`options.depth`), in the order of `MILConfig`.

    Fields that say how an encoder is adapted count among the configs that adapt one.
    """
    flat = [flat_config(config) for config in configs]
    names = dict.fromkeys(name for row in flat for name in row)
    changed = []
    for name in names:
        only_lora = name in _LORA_ONLY
        values = {json.dumps(row.get(name)) for row in flat if row["lora_rank"] or not only_lora}
        changed += [name] if len(values) > 1 else []
    return changed


def flat_config(config: MILConfig) -> dict[str, Any]:
    """A config as one level of plain values."""
    plain = to_plain(replace(config, options={}))
    plain.pop("options")
    return plain | {f"options.{name}": value for name, value in config.options.items()}
