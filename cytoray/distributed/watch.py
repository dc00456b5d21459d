"""Shows a training run from the driver by following its event file."""

from __future__ import annotations

import threading
from typing import Any

from cytoray.progress import Progress
from cytoray.runs import RunFolder

_EVERY_S = 1.0
# Training that waits more than this share of its time for tiles is starved by the readers.
_STARVED = 0.1


class EventWatch:
    """Follows `events.jsonl` in a thread and keeps the progress display up to date.

    Args:
        folder: the run.
        progress: where to show it.
        total_steps: steps of the whole run.
    """

    def __init__(self, folder: RunFolder, progress: Progress, *, total_steps: int) -> None:
        self._folder, self._progress = folder, progress
        self._total = total_steps
        self._seen = sum(1 for _ in folder.read_events())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> EventWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def _follow(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self._read()

    def _read(self) -> None:
        events = list(self._folder.read_events())
        for event in events[self._seen :]:
            self._show(event)
        self._seen = len(events)

    def _show(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "start":
            text = f"training starts at step {event['step']} with {event['world']} worker(s)"
            for skipped in event.get("skipped_checkpoints", []):
                text += f"; checkpoint passed over: {skipped}"
            self._progress.note(text)
        elif kind in ("failed", "stopped", "collapse"):
            self._progress.note(f"{kind} at step {event['step']}: {event['error']}")
        elif kind == "step":
            self._progress.update(
                "train",
                event["step"],
                self._total,
                "steps",
                detail=f"loss {event['loss']:.3f}, {event['tiles_per_s']:.1f} tiles/s, "
                f"waits {event['wait_share']:.0%}",
            )
            self._progress.bottleneck(*self._bottleneck(event))

    @staticmethod
    def _bottleneck(event: dict[str, Any]) -> tuple[str, str]:
        """The slowest stage: training, or the dearest part of reading when training waits."""
        if event["wait_share"] < _STARVED:
            return "train", f"{event['train_ms_per_tile']:.1f} ms/tile"
        stages = {name: event[f"{name}_ms_per_tile"] for name in ("read", "detect", "perturb")}
        slowest = max(stages, key=lambda name: stages[name])
        return slowest, f"{stages[slowest]:.1f} ms/tile, training waits {event['wait_share']:.0%}"
