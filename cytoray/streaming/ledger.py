"""Which tiles a run has used, step by step, over kills and restarts.

With `--log-tiles` every worker appends the tile ids of each of its steps to `tiles-rank<r>.jsonl`.
A run that was killed goes on from its last checkpoint: the steps it had taken since are undone with
the weights they made, and taken again. What counts is the last attempt at each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from cytoray.runs import read_events


def ledger_path(folder: Path, rank: int) -> Path:
    """The ledger of a worker."""
    return folder / f"tiles-rank{rank}.jsonl"


def used_tiles(folder: Path) -> list[list[str]]:
    """Tile ids of every step that counts, in the order they were dealt; index 0 is step 1.

    Args:
        folder: of a run with `--log-tiles`.

    Raises:
        ValueError: a step is missing, or a worker's share of it.
    """
    starts = [event for event in read_events(folder / "events.jsonl") if event["event"] == "start"]
    lines: dict[tuple[str, int], dict[int, list[str]]] = {}
    for path in folder.glob("tiles-rank*.jsonl"):
        rank = int(path.stem.removeprefix("tiles-rank"))
        for line in read_events(path):
            lines.setdefault((line["attempt"], line["step"]), {})[rank] = line["tile_ids"]
    last = max((step for _, step in lines), default=0)
    return [_shares(_attempt_at(starts, step), step, lines) for step in range(1, last + 1)]


def _attempt_at(starts: Iterable[Mapping[str, Any]], step: int) -> Mapping[str, Any]:
    """The last attempt that began before `step`."""
    before = [start for start in starts if start["step"] < step]
    if not before:
        raise ValueError(f"no start of the run covers step {step}")
    return before[-1]


def _shares(
    start: Mapping[str, Any], step: int, lines: Mapping[tuple[str, int], Mapping[int, list[str]]]
) -> list[str]:
    shares = lines.get((start["attempt"], step), {})
    if sorted(shares) != list(range(start["world"])):
        raise ValueError(
            f"step {step} has the tiles of workers {sorted(shares)} of {start['world']}"
        )
    return [name for rank in sorted(shares) for name in shares[rank]]


def ledger_problems(steps: Iterable[Collection[str]], tile_ids: Collection[str]) -> list[str]:
    """What is wrong with the order of a run: in every epoch each tile is to be used once.

    Args:
        steps: from `used_tiles`.
        tile_ids: all tiles of an epoch.

    Returns:
        A sentence for each fault; the last epoch may be incomplete.
    """
    used = [name for step in steps for name in step]
    wanted, problems = set(tile_ids), []
    for epoch, begin in enumerate(range(0, len(used), len(wanted))):
        part = used[begin : begin + len(wanted)]
        twice = [name for name, times in Counter(part).items() if times > 1]
        strange = set(part) - wanted
        if twice:
            problems.append(f"epoch {epoch}: {len(twice)} tiles used more than once: {twice[:3]}")
        if strange:
            problems.append(f"epoch {epoch}: {len(strange)} tiles are not of this data")
        if len(part) == len(wanted) and wanted - set(part):
            problems.append(f"epoch {epoch}: {len(wanted - set(part))} tiles not used")
    return problems
