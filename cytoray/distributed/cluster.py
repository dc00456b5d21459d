"""Joining or starting a Ray cluster, and checking that a job fits before it starts."""

from __future__ import annotations

import atexit
import logging
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from cytoray.errors import InputError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Ray prints an error for every actor pool of Ray Data, which always hands its code over through
    # the object store. Set this to `info` to see what the C++ side has to say.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Ray frees objects once a second: hundreds of MB of tiles lie dead in the store by then, and a
    # page of it that was never used before costs ten times what copying a tile into it does.
    "RAY_free_objects_period_milliseconds": "50",
}
# Of a cluster started here, which has no dashboard: what would be collected for it takes some
# percent of a small machine.
_UNSEEN = {
    "RAY_task_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # Ray's log monitor looks for new files ten times a second, for logs nobody is shown.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "60",
}
_AUTH_TOKEN = Path("~/.ray/auth_token")
_NO_CLUSTER = "start one with `ray start --head`, or leave --address out to run here"
_ANSWER_WITHIN_S = 5.0
_END_WITHIN_S = 3.0


def connect(address: str | None = None, *, num_cpus: int | None = None, preload: str = "") -> None:
    """Join the cluster at `address`, or start one on this machine; do nothing when connected.

    Args:
        address: `auto`, `HOST:PORT` or None. None starts a private cluster on this machine (or
            joins the one a Ray job runs in, through `RAY_ADDRESS`).
        num_cpus: logical CPUs of a cluster started here; default: the environment variable
            `CYTORAY_NUM_CPUS`, else the cores this process may use.
        preload: a module that the processes of a cluster started here import at once, while the
            caller goes on, and not when the first work reaches them.

    Raises:
        InputError: no cluster answers at `address`, or Ray does not start here.
    """
    if ray.is_initialized():
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS")
    options = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "cytoray"}
    if address:
        check_reachable(address)
        if _AUTH_TOKEN.expanduser().exists():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        try:
            ray.init(address=address, **options)  # type: ignore[arg-type]
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"no Ray cluster answers at {address!r} ({str(error).strip().splitlines()[0]}); "
                f"{_NO_CLUSTER}"
            ) from None
    else:
        for name, value in _UNSEEN.items():
            os.environ.setdefault(name, value)
        if preload:
            os.environ.setdefault("RAY_preload_python_modules", preload)
        cpus = num_cpus or int(os.environ.get("CYTORAY_NUM_CPUS", "0")) or _usable_cores()
        try:
            ray.init(num_cpus=cpus, include_dashboard=False, **options)  # type: ignore[arg-type]
        except Exception as error:  # Ray raises no class of its own here
            why = "within its 30 s: this machine is too busy"
            if "timed out during startup" not in str(error):
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                why = f"({said}); the machine may be too busy, or Ray's log says more"
            raise InputError(
                f"Ray did not start {why}; run the command again when it is less so, or give the "
                "--address of a running cluster"
            ) from error
        atexit.register(_end_cluster)


def _end_cluster() -> None:
    """Shut the cluster of this process down, and end processes of it that do not end themselves.

    A worker of Ray sometimes hangs in its own exit, where it is nobody's any more.
    """
    processes = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            processes += child.children(recursive=True) if child.name() == "raylet" else []
    ray.shutdown()
    for process in psutil.wait_procs(processes, timeout=_END_WITHIN_S)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def check_reachable(address: str) -> None:
    """Knock at a `HOST:PORT` address; Ray itself tries for minutes before it gives up.

    Raises:
        InputError: it has no port, or nobody listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or not port.isdigit():
        raise InputError(f"--address {address!r} must be `auto` or HOST:PORT, e.g. 10.0.0.5:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at {address!r} ({error}); {_NO_CLUSTER}"
        ) from None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one part of a job must have at the same time as the other parts.

    Attributes:
        what: the part, in the user's words.
        count: how many of them at least.
        cpus: CPUs of each.
        gpus: GPUs of each.
    """

    what: str
    count: int
    cpus: float
    gpus: float = 0.0


def check_fits(needs: list[Need], *, hint: str) -> None:
    """Refuse a job whose parts cannot all run at once, which in Ray would hang without a word.

    Args:
        needs: everything that must run at the same time.
        hint: how to make it fit, a sentence.

    Raises:
        InputError: says what is asked, what the cluster has and what is missing.
    """
    have = ray.cluster_resources()
    problems = []
    for kind, field in (("CPU", "cpus"), ("GPU", "gpus")):
        wanted = sum(n.count * getattr(n, field) for n in needs)
        there = have.get(kind, 0.0)
        if wanted > there + 1e-6:
            parts = ", ".join(
                f"{n.count} x {n.what} ({getattr(n, field):g} {kind} each)"
                for n in needs
                if getattr(n, field) > 0
            )
            problems.append(
                f"{kind}: {wanted:g} needed at once, the cluster has {there:g} "
                f"({wanted - there:g} missing): {parts}"
            )
    if problems:
        raise InputError(f"the cluster is too small for this job; {hint}", problems)


@dataclass(frozen=True, kw_only=True)
class Share:
    """How a pretraining or embedding job spreads over the CPUs of the cluster.

    Attributes:
        cpus_per_worker: CPUs of each GPU (or CPU) training worker.
        cpus_per_reader: CPUs of each reading actor.
        min_readers: reading actors from the start.
        max_readers: reading actors at most.
        cpus_source: CPUs of the task that lists what to read.
    """

    cpus_per_worker: float
    cpus_per_reader: float
    min_readers: int
    max_readers: int
    cpus_source: float = 0.1

    @property
    def worker_threads(self) -> int:
        """Threads of a training worker that computes on its CPUs."""
        return max(1, round(self.cpus_per_worker))


def share_cpus(
    total_cpus: float, workers: int, *, cpus_per_worker: float | None, max_readers: int | None
) -> Share:
    """Divide the CPUs: workers first, readers the rest, fractions on a small machine.

    Args:
        total_cpus: of the cluster.
        workers: training workers.
        cpus_per_worker: as asked; None: 1, or less where workers and readers need more than there
            is (two workers on two cores take half a CPU each), but never less than half of one.
        max_readers: as asked; None: as many as fit.
    """
    per_worker = cpus_per_worker
    if per_worker is None:
        per_worker = 1.0 if total_cpus >= 2 * workers else max(0.5, total_cpus / (2 * workers))
    rest = total_cpus - workers * per_worker - 0.1
    per_reader = 1.0 if rest >= 2 else 0.4
    fit = max(1, int(rest / per_reader + 1e-9))
    most = max(1, min(fit, max_readers) if max_readers else fit)
    return Share(
        cpus_per_worker=per_worker,
        cpus_per_reader=per_reader,
        # The few readers of a small machine start at once; Ray Data would hold the CPUs of the
        # second one back.
        min_readers=most if per_reader < 1 else 1,
        max_readers=most,
    )


class Shared:
    """A value put into the object store once, for the actors of any stage to look at.

    Held inside an object, the reference reaches an actor as it is; as a plain argument it would be
    turned into the value before the actor starts.
    """

    def __init__(self, value: object) -> None:
        self._reference = ray.put(value)

    def get(self) -> Any:
        """The value; arrays in it are read-only views of the store."""
        return ray.get(self._reference)
