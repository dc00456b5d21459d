"""The run folder: the resolved config, what happened, the summary, and the guard against mix-ups.

A run folder holds `run.json` (which job and run it belongs to), `config.yaml` (the resolved
config; `--config` runs it again), `events.jsonl` (one JSON object a line), `summary.json` and
`report.html`.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import cytoray
from cytoray.config import to_plain
from cytoray.errors import InputError
from cytoray.io import atomic_write_text
from cytoray.plain import json_ready

# How and where a run is computed, not what it computes: these may differ when it is resumed.
MAY_CHANGE = frozenset(
    {"address", "config", "dry_run", "out", "resources", "resume", "tracking_uri", "workers"}
)

_ABSENT = "(absent)"


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A folder that belongs to one run of one job. Make it with `RunFolder.open`.

    Attributes:
        path: the folder, absolute.
        kind: the job, e.g. `pretrain`.
        run_id: stays the same over resumes; also a good key for the tracker.
        resumed: whether the folder held this run already.
    """

    path: Path
    kind: str
    run_id: str
    resumed: bool

    @property
    def config_path(self) -> Path:
        """`config.yaml`."""
        return self.path / "config.yaml"

    @property
    def events_path(self) -> Path:
        """`events.jsonl`."""
        return self.path / "events.jsonl"

    @property
    def summary_path(self) -> Path:
        """`summary.json`."""
        return self.path / "summary.json"

    @property
    def report_path(self) -> Path:
        """`report.html`."""
        return self.path / "report.html"

    @classmethod
    def open(
        cls,
        path: str | Path,
        kind: str,
        config: Mapping[str, Any],
        resume: bool = False,
        may_change: Collection[str] = MAY_CHANGE,
    ) -> RunFolder:
        """Make the folder of a new run, or take up the run that is in it.

        Args:
            path: the output folder. With `resume`, an absent or empty folder starts a new run, so
                the same command works the first and every later time.
            kind: the job.
            config: the resolved config as plain values (dataclasses, tuples and paths are fine).
            resume: go on with the run in the folder.
            may_change: dotted field names, or their first or last parts, that a resumed run may
                have with another value.

        Raises:
            InputError: the folder holds something else, another job, a run without `resume`, or
                this run with another config (each changed field is named).
        """
        folder = Path(path).expanduser().resolve()
        plain = dict(to_plain(config))
        header = _read_header(folder)
        if header is None:
            return cls._create(folder, kind, plain)
        if header.get("kind") != kind:
            raise InputError(
                f"{folder} belongs to a run of `{header.get('kind')}`, not `{kind}`: "
                "choose another --out"
            )
        if not resume:
            raise InputError(
                f"{folder} already holds a run of `{kind}` (started {header.get('created')}): "
                "pass --resume to go on with it, or choose another --out"
            )
        run = cls(path=folder, kind=kind, run_id=header["run_id"], resumed=True)
        run._take_up(plain, may_change)
        return run

    @classmethod
    def _create(cls, folder: Path, kind: str, config: dict[str, Any]) -> RunFolder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run = cls(path=folder, kind=kind, run_id=uuid.uuid4().hex, resumed=False)
            header = {"kind": kind, "run_id": run.run_id, "created": _now()}
            header["cytoray"] = cytoray.__version__
            atomic_write_text(folder / "run.json", json.dumps(header, indent=2) + "\n")
            atomic_write_text(run.config_path, yaml.safe_dump(config, sort_keys=False))
        except OSError as error:
            raise InputError(
                f"cannot write to {folder}: {error.strerror}; choose another --out"
            ) from error
        run.append_event({"event": "started"})
        return run

    def _take_up(self, config: dict[str, Any], may_change: Collection[str]) -> None:
        """Check `config` against the stored one, store the allowed changes, note the resume."""
        # A start that was killed between its first two files has no config yet.
        stored = read_config(self.config_path) if self.config_path.exists() else None
        changes = [] if stored is None else config_changes(stored, config)
        refused = [change for change in changes if not _may_change(change[0], may_change)]
        if refused:
            raise InputError(
                f"{self.path} was started with another config: undo these changes to resume it, "
                "or choose another --out",
                [f"{field}: {_show(old)} -> {_show(new)}" for field, old, new in refused],
            )
        if changes or stored is None:
            atomic_write_text(self.config_path, yaml.safe_dump(config, sort_keys=False))
        self.append_event(
            {"event": "resumed", "changed": {field: _show(new) for field, _, new in changes}}
        )

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Append one line to `events.jsonl`; `time` (UTC, ISO 8601) is added when missing."""
        append_event(self.events_path, event)

    def read_events(self) -> Iterator[dict[str, Any]]:
        """All events so far, oldest first."""
        return read_events(self.events_path)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace `summary.json`, atomically."""
        atomic_write_text(self.summary_path, json.dumps(json_ready(summary), indent=2) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """The summary, or None while the run has not written one."""
        if not self.summary_path.exists():
            return None
        return json.loads(self.summary_path.read_text())


def _read_header(folder: Path) -> dict[str, Any] | None:
    """The content of `run.json`; None for an absent or empty folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: choose another --out")
    path = folder / "run.json"
    if path.exists():
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged: choose another --out") from error
    if not folder.exists():
        return None
    harmless = ("mlflow.db", "mlartifacts", "mlruns")
    names = sorted(entry.name for entry in folder.iterdir())
    others = [name for name in names if not name.startswith((".", *harmless))]
    if others:
        shown = ", ".join(others[:3])
        raise InputError(
            f"{folder} is not a cytoray run and is not empty ({shown}): choose another --out"
        )
    return None


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a `config.yaml`.

    Raises:
        InputError: absent, not YAML, or not a mapping.
    """
    try:
        config = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"the config {path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"the config {path} must hold `name: value` lines")
    return config


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Compare two configs after the same plain-value conversion.

    Returns:
        (dotted field, old value, new value) of each difference; "(absent)" where a field is new
        or gone.
    """
    flat_old, flat_new = _flatten(to_plain(old)), _flatten(to_plain(new))
    fields = [*flat_old, *(name for name in flat_new if name not in flat_old)]
    pairs = (
        (field, flat_old.get(field, _ABSENT), flat_new.get(field, _ABSENT)) for field in fields
    )
    return [(name, before, after) for name, before, after in pairs if before != after]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _may_change(field: str, may_change: Collection[str]) -> bool:
    parts = field.split(".")
    return bool({field, parts[0], parts[-1]} & set(may_change))


def _show(value: Any) -> str:
    return value if value == _ABSENT else json.dumps(value)


def append_event(path: str | Path, event: Mapping[str, Any]) -> None:
    """Append `event` as one JSON line, in a single write: lines of several writers do not mix.

    A line that a killed process left open is closed first. A value JSON has no name for (NaN,
    infinity) becomes null.
    """
    record = {"time": _now(), **json_ready(event)}
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    with Path(path).open("a+b", buffering=0) as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                line = b"\n" + line
        stream.write(line)


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a file, leaving out torn lines; nothing for an absent file."""
    if not Path(path).exists():
        return
    with Path(path).open("rb") as stream:
        for line in stream:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
