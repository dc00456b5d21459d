"""What a long job is doing: a live table on a terminal, plain lines in a log."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cytoray.stage_view import stage_line, stage_table
from cytoray.stages import Bottleneck, StageLoad, find_bottleneck

RATE_WINDOW_S = 30.0
LINE_INTERVAL_S = 10.0


@dataclass
class _Stage:
    """One row: counts so far and the samples (seconds, done) its rate is taken from."""

    unit: str = ""
    done: float = 0.0
    total: float | None = None
    detail: str = ""
    printed: tuple[float, str] | None = None  # done and detail of the last line
    samples: deque[tuple[float, float]] = field(default_factory=deque)
    started_s: float = 0.0
    finished_s: float | None = None

    def rate(self) -> float | None:
        """Units per second over the last half minute; None before two samples."""
        first, last = self.samples[0], self.samples[-1]
        seconds = last[0] - first[0]
        return (last[1] - first[1]) / seconds if seconds > 0 else None

    def eta_s(self) -> float | None:
        """Seconds left at the present rate; None when there is no telling."""
        rate = self.rate()
        if self.total is None or not rate or self.finished_s is not None:
            return None
        return max(self.total - self.done, 0.0) / rate

    def has_news(self) -> bool:
        """Whether a line would say something that the last one did not."""
        return self.printed != (self.done, self.detail)

    def add(self, now_s: float, done: float) -> None:
        if not self.samples:
            self.started_s = now_s
        self.samples.append((now_s, done))
        while len(self.samples) > 2 and now_s - self.samples[1][0] > RATE_WINDOW_S:
            self.samples.popleft()
        self.done = done
        complete = self.total is not None and done >= self.total
        self.finished_s = (self.finished_s or now_s) if complete else None


class Progress:
    """Stages of a job with counts, rates and time left.

    On a terminal a table is redrawn in place; anywhere else a stage prints one line at its first
    update, then at most every `line_interval_s` where something changed, and one when it is
    complete. Safe to update from several threads.

    Args:
        title: the job, shown above the stages.
        console: where to draw; standard error by default.
        line_interval_s: seconds between lines of one stage when there is no terminal.
        clock: seconds, monotonic; replaced in tests.
    """

    def __init__(
        self,
        title: str,
        console: Console | None = None,
        line_interval_s: float = LINE_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = title
        self._console = console or Console(stderr=True)
        self._line_interval_s = line_interval_s
        self._clock = clock
        self._lock = threading.RLock()
        self._stages: dict[str, _Stage] = {}
        self._printed_s: dict[str, float] = {}
        self._bottleneck: Bottleneck | None = None
        self._loads: Sequence[StageLoad] = ()
        self._loads_unit, self._loads_note = "", ""
        self._loads_printed_s: float | None = None
        self._note = ""
        self._started_s = clock()
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._started_s = self._clock()
        if self._console.is_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=4)
            self._live.start()
        else:
            self._line(self.title)
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None
            return
        with self._lock:
            for name, stage in self._stages.items():
                if stage.has_news():
                    self._line(self._describe(name, stage))
            outcome = "stopped" if error_type else "done"
            self._line(f"{self.title}: {outcome} in {duration(self._clock() - self._started_s)}")

    def update(
        self, stage: str, done: float, total: float | None = None, unit: str = "", detail: str = ""
    ) -> None:
        """Set how far a stage is.

        Args:
            stage: its name; a new name adds a row.
            done: units finished so far (not since the last call).
            total: units in all; None when unknown, or to keep the last known.
            unit: what is counted, e.g. `tiles`.
            detail: a few words shown behind, e.g. `loss 3.21`; in a log, where they changed.
        """
        with self._lock:
            row = self._stages.setdefault(stage, _Stage())
            row.total = row.total if total is None else float(total)
            row.unit = unit or row.unit
            row.detail = detail or row.detail
            was_finished = row.finished_s is not None
            row.add(self._clock(), float(done))
            if not self._live and self._is_due(stage, row, was_finished):
                self._printed_s[stage] = row.samples[-1][0]
                self._line(self._describe(stage, row))

    def bottleneck(self, stage: str, why: str = "", advice: str = "") -> None:
        """Mark the stage the others wait for.

        Args:
            stage: its name.
            why: a few words, e.g. `busy 97 %, train waits 41 %`.
            advice: what to do about it.
        """
        with self._lock:
            changed = self._bottleneck is None or self._bottleneck.name != stage
            self._bottleneck = Bottleneck(stage, why, advice)
            if changed and not self._live:
                self._line(self._bottleneck_text())

    def loads(self, loads: Sequence[StageLoad], unit: str, note: str = "") -> None:
        """Show how busy the stages of a stream are, and which one holds it up.

        Args:
            loads: stages in the order of the stream; nothing is shown while there are none.
            unit: what they count, e.g. `tiles`.
            note: a few words below, e.g. of memory.
        """
        with self._lock:
            self._loads, self._loads_unit, self._loads_note = loads, unit, note
            if not loads:
                return
            now_s = self._clock()
            last_s = self._loads_printed_s
            if not self._live and (last_s is None or now_s - last_s >= self._line_interval_s):
                self._loads_printed_s = now_s
                self._line(" | ".join(filter(None, [stage_line(loads, unit), note])))
            found = find_bottleneck(loads)
            if found is not None:
                self.bottleneck(*found)

    def _bottleneck_text(self) -> str:
        """E.g. `bottleneck: detect (busy 91%, train waits 40%); add CPU nodes`."""
        assert self._bottleneck is not None
        name, why, advice = self._bottleneck
        text = f"bottleneck: {name}" + (f" ({why})" if why else "")
        return text + (f"; {advice}" if advice else "")

    def note(self, text: str) -> None:
        """Say something once: below the table on a terminal, else as a line."""
        with self._lock:
            self._note = text
            if not self._live:
                self._line(text)

    def _is_due(self, name: str, stage: _Stage, was_finished: bool) -> bool:
        if name not in self._printed_s:
            return True
        if stage.finished_s is not None:
            return not was_finished
        return (
            stage.has_news()
            and stage.samples[-1][0] - self._printed_s[name] >= self._line_interval_s
        )

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _describe(self, name: str, stage: _Stage) -> str:
        """One log line, e.g. `embed: 40/120 tiles (33 %), 12.1 tiles/s, 7 s left`."""
        parts = [f"{name}: {counts(stage.done, stage.total)} {stage.unit}".rstrip()]
        if stage.total:
            parts[0] += f" ({100 * stage.done / stage.total:.0f} %)"
        rate = stage.rate()
        if rate:
            parts.append(f"{_number(rate)} {stage.unit}/s".replace(" /s", "/s"))
        if stage.finished_s is not None:
            parts.append(f"done in {duration(stage.finished_s - stage.started_s)}")
        elif (eta_s := stage.eta_s()) is not None:
            parts.append(f"{duration(eta_s)} left")
        if stage.detail and (stage.printed is None or stage.detail != stage.printed[1]):
            parts.append(stage.detail)
        stage.printed = (stage.done, stage.detail)
        if self._is_bottleneck(name):
            parts.append("bottleneck")
        return ", ".join(parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            elapsed = duration(self._clock() - self._started_s)
            yield Text.assemble((self.title, "bold"), f"  {elapsed}")
            if self._stages:
                yield self._table()
            if self._loads:
                yield Text()
                yield stage_table(self._loads, self._bottleneck, self._loads_unit)
            if self._bottleneck:
                yield Text(self._bottleneck_text(), style="bold yellow")
            for text in filter(None, [self._loads_note, self._note]):
                yield Text(text, style="dim")

    def _is_bottleneck(self, name: str) -> bool:
        return self._bottleneck is not None and self._bottleneck.name == name

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for _ in range(6):
            table.add_column(no_wrap=True)
        for name, stage in self._stages.items():
            rate, eta_s = stage.rate(), stage.eta_s()
            if stage.finished_s is not None:
                left = f"done in {duration(stage.finished_s - stage.started_s)}"
            else:
                left = f"{duration(eta_s)} left" if eta_s is not None else ""
            mark = "bottleneck" if self._is_bottleneck(name) and not self._loads else ""
            table.add_row(
                Text(name, style="cyan"),
                ProgressBar(total=stage.total, completed=stage.done, width=24, pulse=False),
                Text(f"{counts(stage.done, stage.total)} {stage.unit}"),
                Text(f"{_number(rate)}/s" if rate else ""),
                Text(left),
                Text.assemble(stage.detail, "  " if stage.detail else "", (mark, "bold yellow")),
            )
        return table


def summary_table(
    title: str,
    rows: Mapping[str, Any] | Iterable[tuple[str, Any]],
    console: Console | None = None,
) -> None:
    """Print two columns, name and value, at the end of a job (to standard output)."""
    pairs = rows.items() if isinstance(rows, Mapping) else rows
    table = Table(title=title, box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(str(name)), Text(_shown(value)))
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 200)  # a path cut in two cannot be copied from a log
    console.print(table)


def counts(done: float, total: float | None) -> str:
    """`40/120`, or `40` when the total is unknown."""
    return f"{done:,.0f}" if total is None else f"{done:,.0f}/{total:,.0f}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 14 min`, `3 d 04 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def _shown(value: Any) -> str:
    """A value of a summary; of an interval or another list of numbers each one shortly."""
    if _is_number(value):
        return _number(value)
    if isinstance(value, (list, tuple)) and value and all(map(_is_number, value)):
        return ", ".join(map(_number, value))
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> str:
    """A few significant digits: `1,234`, `56.7`, `0.0123`."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.3g}"
