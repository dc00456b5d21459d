"""Commands as users start them: in this process, and in processes that a test may kill."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


@pytest.fixture
def cytoray(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """cytoray("index", "--manifest", path, ...): the command line, in this process."""
    from pipelines.cli import main

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


class OwnProcess:
    """A command with a Ray of its own, in a session of its own; nothing of it is left behind.

    Args:
        command: what to start.
        cpus: logical CPUs of the Ray it starts.
    """

    def __init__(self, command: list[str], *, cpus: int = 4) -> None:
        self.folder = tempfile.mkdtemp(prefix="cr")  # short: names of Unix sockets
        self.also_remove: list[str] = []
        self.log = Path(self.folder) / "log.txt"
        environment = os.environ | {"RAY_TMPDIR": self.folder, "CYTORAY_NUM_CPUS": str(cpus)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 300) -> None:
        """Look every 10 ms until the condition holds; the process must not end before."""
        end = time.monotonic() + timeout_s
        while not condition():
            text = self.log.read_text(errors="replace")
            assert self.process.poll() is None, f"it ended by itself:\n{text}"
            assert time.monotonic() < end, f"nothing happened in {timeout_s} s:\n{text}"
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL to the command itself, then wait until its Ray has noticed."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        end = time.monotonic() + 30
        while self.others() and time.monotonic() < end:
            time.sleep(0.05)
        self.stop()

    def others(self) -> list[psutil.Process]:
        """Processes alive that were started with our folder in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("RAY_TMPDIR") == self.folder
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def stop(self) -> None:
        """End everything that was started, and remove its folder."""
        while left := self.others():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        self.process.wait()
        for folder in (self.folder, *self.also_remove):
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start_process() -> Iterator[Callable[..., OwnProcess]]:
    """start_process([...]) -> OwnProcess, ended with the test."""
    started: list[OwnProcess] = []

    def start(command: list[object], **options: int) -> OwnProcess:
        started.append(OwnProcess([str(word) for word in command], **options))
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.fixture
def start_cytoray(start_process: Callable[..., OwnProcess]) -> Callable[..., OwnProcess]:
    """start_cytoray("index", ...): the command line in a process that may be killed."""

    def start(*argv: object) -> OwnProcess:
        return start_process([sys.executable, "-m", "pipelines.cli", *argv])

    return start


class Head:
    """`ray start --head` with a job server, on free ports.

    Attributes:
        address: for `--address` of a job.
        server: for `--address` of `submit`.
    """

    def __init__(self, start: Callable[..., OwnProcess], *, cpus: int = 4) -> None:
        port, dashboard, client, agent = _free_ports(4)
        self.address = f"127.0.0.1:{port}"
        self.server = f"http://127.0.0.1:{dashboard}"
        temporary = tempfile.mkdtemp(prefix="cr")
        ray = Path(sys.executable).with_name("ray")
        self.process = start(
            [ray, "start", "--head", "--block", f"--port={port}", "--dashboard-host=127.0.0.1",
             f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
             f"--ray-client-server-port={client}", f"--num-cpus={cpus}",
             "--object-store-memory=200000000", f"--temp-dir={temporary}", "--disable-usage-stats"]
        )  # fmt: skip
        self.process.also_remove.append(temporary)
        self.process.wait_for(self.is_up)

    def is_up(self) -> bool:
        """Whether the job server answers."""
        try:
            with urllib.request.urlopen(f"{self.server}/api/version", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


@pytest.fixture
def head(start_process: Callable[..., OwnProcess]) -> Head:
    """A running head of four logical CPUs."""
    return Head(start_process)
