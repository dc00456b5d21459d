"""The aggregators by name. A new one is a new file and a line here."""

from __future__ import annotations

from typing import Any

from cytoray.errors import InputError, choose
from cytoray.mil.abmil import ABMIL
from cytoray.mil.base import Aggregator, options_of
from cytoray.mil.clam import CLAM
from cytoray.mil.dsmil import DSMIL
from cytoray.mil.dtfd import DTFD
from cytoray.mil.max import MaxPool
from cytoray.mil.mean import MeanPool
from cytoray.mil.transmil import TransMIL

AGGREGATORS: dict[str, type[Aggregator]] = {
    "mean": MeanPool,
    "max": MaxPool,
    "abmil": ABMIL,
    "clam": CLAM,
    "transmil": TransMIL,
    "dsmil": DSMIL,
    "dtfd": DTFD,
}


def build_aggregator(name: str, in_dim: int, num_classes: int, **options: Any) -> Aggregator:
    """Build an aggregator.

    Args:
        name: a key of `AGGREGATORS`.
        in_dim: width D of the instance features.
        num_classes: C, at least 2.
        **options: the aggregator's own keyword options.

    Raises:
        InputError: an unknown name or option (the valid ones are listed), or fewer than 2 classes.
    """
    factory = AGGREGATORS[choose("aggregator", name, AGGREGATORS)]
    valid = options_of(factory)
    for option in options:
        choose(f"option of aggregator {name}", option, valid)
    if num_classes < 2:
        raise InputError(f"an aggregator needs at least 2 classes, got {num_classes}")
    return factory(in_dim, num_classes, **options)
