"""The aggregators by name. A new one is a new file and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cytoray.errors import choose
from cytoray.mil.abmil import ABMIL
from cytoray.mil.base import Aggregator, options_of
from cytoray.mil.clam import CLAM, CLAMMB
from cytoray.mil.dsmil import DSMIL
from cytoray.mil.dtfd import DTFD
from cytoray.mil.less import LESS
from cytoray.mil.max import MaxPool
from cytoray.mil.mean import MeanPool
from cytoray.mil.transmil import TransMIL
from cytoray.mil.unicas import UniCAS

AGGREGATORS: dict[str, type[Aggregator]] = {
    "mean": MeanPool,
    "max": MaxPool,
    "abmil": ABMIL,
    "clam": CLAM,
    "clam_mb": CLAMMB,
    "transmil": TransMIL,
    "dsmil": DSMIL,
    "dtfd": DTFD,
    "less": LESS,
    "unicas": UniCAS,
}


def build_aggregator(
    name: str, in_dim: int, num_classes: int | Sequence[int], **options: Any
) -> Aggregator:
    """Build an aggregator.

    Args:
        name: a key of `AGGREGATORS`.
        in_dim: width D of the instance features.
        num_classes: C, at least 2; or one C for each of several tasks.
        **options: the aggregator's own keyword options.

    Raises:
        InputError: an unknown name or option (the valid ones are listed), fewer than 2 classes, or
            several tasks for an aggregator of one.
    """
    factory = AGGREGATORS[choose("aggregator", name, AGGREGATORS)]
    valid = options_of(factory)
    for option in options:
        choose(f"option of aggregator {name}", option, valid)
    return factory(in_dim, num_classes, **options)
