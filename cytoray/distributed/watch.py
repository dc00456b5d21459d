"""Shows a training run from the driver: its event file, and how busy its stages are."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from typing import Any

from cytoray.distributed.stage_meter import PRETRAIN_STAGES, StageWatch, meter_name
from cytoray.progress import Progress
from cytoray.runs import RunFolder

_EVERY_S = 1.0


class EventWatch:
    """Follows `events.jsonl` and the run's meter in threads and keeps the display up to date.

    Args:
        folder: the run.
        progress: where to show it.
        total_steps: steps of the whole run.
    """

    def __init__(self, folder: RunFolder, progress: Progress, *, total_steps: int) -> None:
        self._folder, self._progress = folder, progress
        self._total = total_steps
        self._offset = folder.events_path.stat().st_size
        self._stages = StageWatch(meter_name(folder), PRETRAIN_STAGES, progress)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> EventWatch:
        self._thread.start()
        self._stages.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._stages.__exit__()
        self._stop.set()
        self._thread.join()
        self.read()

    def _follow(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self.read()

    def read(self) -> None:
        """Show what was written since the last call."""
        for event in self._new_events():
            self._show(event)

    def _new_events(self) -> Iterator[dict[str, Any]]:
        """Whole lines written since the last look; the file may be long, its end is short."""
        with self._folder.events_path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # left open by a process that was killed
                continue

    def _show(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "start":
            text = f"training starts at step {event['step']} with {event['world']} worker(s)"
            for skipped in event.get("skipped_checkpoints", []):
                text += f"; checkpoint passed over: {skipped}"
            self._progress.note(text)
        elif kind in ("collapse", "collapse_ended"):
            self._progress.note(f"step {event['step']}: {event['message']}")
        elif kind in ("failed", "stopped"):
            where = f" at step {event['step']}" if event["step"] >= 0 else ""
            self._progress.note(f"{kind}{where}: {event['error']}")
        elif kind == "probe_failed":
            self._progress.note(f"probe of step {event['step']} failed: {event['error']}")
        elif kind == "probe":
            self._progress.note(
                f"probe of step {event['step']}: kNN accuracy "
                f"{event['probe_knn_accuracy']:.3f}, linear {event['probe_linear_accuracy']:.3f}"
            )
        elif kind == "step":
            loss = math.nan if event["loss"] is None else event["loss"]  # JSON has no NaN
            self._progress.update(
                "train",
                event["step"],
                self._total,
                "steps",
                detail=f"loss {loss:.3f}, {event['tiles_per_s']:.1f} tiles/s, "
                f"waits {event['wait_share']:.0%}",
            )
