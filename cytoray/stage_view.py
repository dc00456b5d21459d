"""Stages of a stream for the eye: a table for a terminal, a line for a log."""

from __future__ import annotations

from collections.abc import Sequence

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cytoray.stages import Bottleneck, StageLoad

BAR_WIDTH = 20


def stage_table(loads: Sequence[StageLoad], bottleneck: Bottleneck | None, unit: str) -> Table:
    """A row a stage: share of its workers' time, rate, cost, queue, workers; the slowest marked."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("stage", "busy", ""):
        table.add_column(title, no_wrap=True)
    for title in (f"{unit}/s", f"ms a {unit.removesuffix('s')}", "queue", "workers"):
        table.add_column(title, no_wrap=True, justify="right")
    for load in loads:
        slow = bottleneck is not None and bottleneck.name == load.name
        style = "bold yellow" if slow else ""
        busy = load.busy_share
        table.add_row(
            Text(load.name, style=style or "cyan"),
            ProgressBar(
                total=1.0,
                completed=busy or 0.0,
                width=BAR_WIDTH,
                complete_style="yellow" if slow else "bar.complete",
                finished_style="yellow" if slow else "bar.complete",
            ),
            Text("" if busy is None else f"{busy:4.0%}", style=style),
            Text(short(load.rate_per_s)),
            Text("" if load.ms_per_unit is None else short(load.ms_per_unit)),
            Text("" if load.queue is None else f"{load.queue:,.0f}"),
            Text(f"{load.workers:,} {load.stage.group}{'s' * (load.workers != 1)}"),
        )
    return table


def stage_line(loads: Sequence[StageLoad], unit: str) -> str:
    """The same on one line, e.g. `3 readers 52 tiles/s: read 4 %, detect 87 % | 1 trainer ...`."""
    parts = []
    groups = list(dict.fromkeys(load.stage.group for load in loads))
    for group in groups:
        mine = [load for load in loads if load.stage.group == group]
        last = mine[-1]
        plural = "s" * (last.workers != 1)
        busy = ", ".join(
            f"{load.name} {load.busy_share:.0%}" for load in mine if load.busy_share is not None
        )
        text = f"{last.workers:,} {group}{plural} {short(last.rate_per_s)} {unit}/s"
        parts.append(f"{text}: {busy}" if busy else text)
        if last.queue is not None:
            parts[-1] += f", {last.queue:,.0f} {unit} queued"
    return " | ".join(parts)


def short(value: float) -> str:
    """Three significant digits: `1,234`, `56.7`, `0.0123`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
