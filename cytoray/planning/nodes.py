"""The shape of a cluster in words: `4x16cpu@0.35,2x96cpu+8H200@33.6`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cytoray.device_peaks import PEAK_FLOPS
from cytoray.errors import raise_problems

NODE_SYNTAX = "COUNTxCPUScpu[+GPUSxMODEL]@PRICE, e.g. 4x16cpu@0.35 or 2x96cpu+8xH200@33.6"
_NODE = re.compile(
    r"(?P<count>\d+)x(?P<cpus>\d+)cpu(?:\+(?P<gpus>\d+)x(?P<model>[A-Za-z][\w\-]*))?"
    r"@(?P<price>\d+(?:\.\d+)?)"
)


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Nodes of one kind.

    Attributes:
        count: nodes.
        cpus: CPUs of each.
        gpus: GPUs of each.
        gpu_model: a key of `PEAK_FLOPS`; empty without GPUs.
        price_per_hour: of one node, in any currency.
    """

    count: int
    cpus: int
    gpus: int = 0
    gpu_model: str = ""
    price_per_hour: float = 0.0


def parse_nodes(text: str) -> tuple[NodeGroup, ...]:
    """Read groups of nodes separated by commas, each `COUNTxCPUScpu[+GPUSxMODEL]@PRICE`.

    PRICE is that of one node for an hour.

    Raises:
        InputError: with everything that cannot be understood.
    """
    groups, problems = [], []
    for part in (part.strip() for part in text.split(",")):
        found = _NODE.fullmatch(part)
        if found is None:
            problems.append(f"{part!r} is not of the form {NODE_SYNTAX}")
            continue
        group = NodeGroup(
            count=int(found["count"]),
            cpus=int(found["cpus"]),
            gpus=int(found["gpus"] or 0),
            gpu_model=(found["model"] or "").upper(),
            price_per_hour=float(found["price"]),
        )
        if group.count < 1 or group.cpus < 1:
            problems.append(f"{part!r}: a group has at least one node with at least one CPU")
        if group.gpu_model and group.gpu_model not in PEAK_FLOPS:
            valid = ", ".join(sorted(PEAK_FLOPS))
            problems.append(f"{part!r}: unknown GPU {found['model']!r}; valid: {valid}")
        if found["gpus"] and not group.gpus:
            problems.append(f"{part!r}: leave out the GPUs of a group that has none")
        groups.append(group)
    if len({group.gpu_model for group in groups} - {""}) > 1:
        problems.append("all GPUs of a cluster must be of one model: they train in step")
    raise_problems("the cluster (--nodes) cannot be understood:", problems)
    return tuple(groups)


def total_cpus(nodes: Sequence[NodeGroup]) -> int:
    """CPUs of all nodes."""
    return sum(group.count * group.cpus for group in nodes)


def total_gpus(nodes: Sequence[NodeGroup]) -> int:
    """GPUs of all nodes."""
    return sum(group.count * group.gpus for group in nodes)


def gpu_model(nodes: Sequence[NodeGroup]) -> str:
    """The model of the GPUs; empty without any."""
    return next((group.gpu_model for group in nodes if group.gpus), "")


def price_per_hour(nodes: Sequence[NodeGroup]) -> float:
    """Price of the whole cluster for an hour."""
    return sum(group.count * group.price_per_hour for group in nodes)
