"""Checkpoints: whole or not there, written beside the training, checked when read.

<dir>/step_00001000/state.pt       tensors and plain values (torch.load, weights_only)
<dir>/step_00001000/encoder/       timm-keyed safetensors + JSON, if given
<dir>/step_00001000/COMPLETE       JSON: size and SHA-256 of every file; written last
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cytoray.errors import InputError
from cytoray.models.encoder import EncoderSpec, replace_folder, write_encoder

STATE_FILE = "state.pt"
MARKER_FILE = "COMPLETE"
ENCODER_FOLDER = "encoder"
_PLAIN_TYPES = (bool, int, float, str, bytes, type(None))
_NAME = re.compile(r"step_(\d+)$")

EncoderExport = tuple[Mapping[str, Tensor], EncoderSpec]


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or could not be written."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder.

    Attributes:
        path: the folder.
        step: steps done when it was taken.
    """

    path: Path
    step: int

    @property
    def encoder(self) -> Path:
        """Its encoder folder, for `load_encoder`."""
        return self.path / ENCODER_FOLDER


@dataclass(frozen=True)
class SkippedCheckpoint:
    """A checkpoint folder that cannot be used, and why; `str` gives both."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class FoundCheckpoint:
    """What `latest_checkpoint` found.

    Attributes:
        checkpoint: the newest good one, None if there is none.
        skipped: newer ones that cannot be used.
    """

    checkpoint: Checkpoint | None
    skipped: tuple[SkippedCheckpoint, ...] = ()

    @property
    def path(self) -> Path | None:
        """Folder of the good one, None if there is none."""
        return self.checkpoint.path if self.checkpoint else None


def save_checkpoint(
    folder: str | Path, step: int, state: Mapping[str, Any], encoder: EncoderExport | None = None
) -> Checkpoint:
    """Write `<folder>/step_<step>`; a reader sees it whole or not at all.

    Args:
        folder: of all checkpoints of the run.
        step: steps done.
        state: tensors and plain values, nested in dicts, lists and tuples.
        encoder: weights with timm keys and their description.

    Raises:
        InputError: the state holds something else than tensors and plain values.
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    _check_plain(state, "state")
    folder = Path(folder)
    path = folder / f"step_{step:08d}"
    draft = folder / f".{path.name}.{uuid.uuid4().hex}.part"
    needed = _num_bytes(state) + (_num_bytes(encoder[0]) if encoder else 0)
    try:
        draft.mkdir(parents=True)
        torch.save(dict(state), draft / STATE_FILE)
        if encoder is not None:
            (draft / ENCODER_FOLDER).mkdir()
            write_encoder(draft / ENCODER_FOLDER, *encoder)
        files = {str(p.relative_to(draft)): _facts(p) for p in _files(draft)}
        marker = {"step": step, "files": files}
        (draft / MARKER_FILE).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        replace_folder(draft, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError, whatever it is
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder}: "
            f"{_why_not_written(error, folder, needed)}"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Checkpoint(path, step)


def _why_not_written(error: Exception, folder: Path, needed: int) -> str:
    """A failed write in words, with how to mend it."""
    if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.strerror or error}"
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    cause = "the disk is full" if free < 2 * needed else f"a quota or limit is reached ({said})"
    return f"{cause}; {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free. Make room"


def _num_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_num_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_num_bytes(item) for item in value)
    return 0


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders, good or not, newest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    named = [p for p in folder.iterdir() if p.is_dir() and _NAME.match(p.name)]
    return sorted(named, key=_step_of, reverse=True)


def latest_checkpoint(folder: str | Path, *, hashes: bool = False) -> FoundCheckpoint:
    """The newest usable checkpoint, and the newer ones that had to be passed over.

    Args:
        folder: of all checkpoints of the run; need not exist.
        hashes: read every file and compare its SHA-256, not only its size.
    """
    skipped: list[SkippedCheckpoint] = []
    for path in list_checkpoints(folder):
        problem = checkpoint_problem(path, hashes=hashes)
        if not problem:
            return FoundCheckpoint(Checkpoint(path, _step_of(path)), tuple(skipped))
        skipped.append(SkippedCheckpoint(path, problem))
    return FoundCheckpoint(None, tuple(skipped))


def checkpoint_problem(path: str | Path, *, hashes: bool = False) -> str:
    """Say what is wrong with a checkpoint folder; an empty string if nothing is."""
    path = Path(path)
    try:
        files = json.loads((path / MARKER_FILE).read_text(encoding="utf-8"))["files"]
    except OSError:
        return f"{MARKER_FILE} is not there: it was not written to its end"
    except (ValueError, KeyError, TypeError):
        return f"{MARKER_FILE} cannot be read"
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is not there"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}"
        if hashes and _facts(file)["sha256"] != facts["sha256"]:
            return f"{name} has changed since it was written"
    return ""


def load_checkpoint(path: str | Path, *, hashes: bool = True) -> dict[str, Any]:
    """The state of a checkpoint, tensors on the CPU; no code in the file is ever run.

    Args:
        path: one `step_*` folder.
        hashes: compare the files with their SHA-256 first.

    Raises:
        InputError: no such folder.
        CheckpointError: not complete, or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"no checkpoint folder at {path}")
    problem = checkpoint_problem(path, hashes=hashes)
    if problem:
        raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
    return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)


class BackgroundCheckpointer:
    """Copies the state to host memory, then writes it on a thread while training goes on.

    One write at a time: `save` first waits for the one before. An error of the writer is raised by
    the next `save`, `wait` or `close`. Use as a context manager, or call `close`.

    Args:
        folder: of all checkpoints of the run.
        keep_last: how many complete checkpoints stay; older ones are removed.
        encoder: description of the encoder whose weights `save` is given.
    """

    def __init__(
        self, folder: str | Path, *, keep_last: int = 2, encoder: EncoderSpec | None = None
    ) -> None:
        if keep_last < 1:
            raise InputError(f"keep_last must be at least 1, is {keep_last}")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.encoder = encoder
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: Checkpoint | None = None
        self._cleaned = False

    def save(
        self, step: int, state: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Snapshot now, write later.

        Args:
            step: steps done.
            state: as for `save_checkpoint`.
            weights: the encoder's, with timm keys; None: no `encoder/` in the checkpoint.

        Raises:
            CheckpointError: the write before failed.
            InputError: the state holds something else than tensors and plain values, or there
                are weights but no description of the encoder.
        """
        self.wait()
        _check_plain(state, "state")
        if not self._cleaned:  # drafts of a process that was killed while writing
            for left in self.folder.glob(".step_*"):
                shutil.rmtree(left, ignore_errors=True)
            self._cleaned = True
        held = snapshot(state)
        export = None
        if weights is not None:
            if self.encoder is None:
                raise InputError("give BackgroundCheckpointer the encoder's description")
            source = dict(self.encoder.source) | {"step": step}
            export = (snapshot(weights), replace(self.encoder, source=source))
        self._thread = threading.Thread(
            target=self._write, args=(step, held, export), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def wait(self) -> Checkpoint | None:
        """Wait for the write under way; returns the last checkpoint written by this object.

        Raises:
            CheckpointError: the write failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(str(error)) from error
        return self._written

    def close(self) -> None:
        """Finish the write under way; raises as `wait`."""
        self.wait()

    def __enter__(self) -> BackgroundCheckpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, step: int, state: dict[str, Any], encoder: EncoderExport | None) -> None:
        try:
            self._written = save_checkpoint(self.folder, step, state, encoder)
            good = [p for p in list_checkpoints(self.folder) if not checkpoint_problem(p)]
            for old in good[self.keep_last :]:
                shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:  # handed to the training thread
            self._error = error


def snapshot(value: Any) -> Any:
    """A copy with every tensor in host memory, sharing nothing with the original."""
    if isinstance(value, Tensor):
        copy = value.detach().to("cpu", copy=True)
        return copy.contiguous()
    if isinstance(value, Mapping):
        return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(v) for v in value)
    return value


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN_TYPES:
        raise InputError(
            f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values"
        )


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _step_of(path: Path) -> int:
    found = _NAME.match(path.name)
    return int(found.group(1)) if found else -1
