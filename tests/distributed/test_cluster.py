from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest

from cytoray.distributed.cluster import (
    Need,
    Shared,
    check_fits,
    check_reachable,
    share_cpus,
)
from cytoray.errors import InputError


@pytest.mark.parametrize("cpus", [1, 2, 4, 16, 96])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_workers_readers_and_source_fit_at_once_where_they_can(cpus, workers) -> None:
    share = share_cpus(cpus, workers, cpus_per_worker=None, max_readers=None)
    least = workers * share.cpus_per_worker + share.cpus_per_reader + share.cpus_source
    if cpus >= workers:
        assert least <= cpus
    most = least + (share.max_readers - 1) * share.cpus_per_reader
    assert most <= max(cpus, least) + 1e-9


def test_two_workers_on_two_cores() -> None:
    share = share_cpus(2, 2, cpus_per_worker=None, max_readers=None)
    assert share.cpus_per_worker == 0.5
    assert (share.min_readers, share.max_readers) == (2, 2)
    assert share_cpus(16, 2, cpus_per_worker=None, max_readers=None).min_readers == 1


def test_what_was_asked_is_given() -> None:
    share = share_cpus(16, 2, cpus_per_worker=4, max_readers=3)
    assert (share.cpus_per_worker, share.max_readers, share.cpus_per_reader) == (4, 3, 1.0)


@pytest.mark.ray
def test_a_job_that_cannot_run_at_once_is_refused_with_the_sum(ray_cluster) -> None:
    fits = [Need(what="worker", count=2, cpus=1.5), Need(what="reader", count=1, cpus=1)]
    check_fits(fits, hint="")
    needs = [Need(what="worker", count=3, cpus=1.5, gpus=1), Need(what="reader", count=1, cpus=1)]
    with pytest.raises(InputError) as caught:
        check_fits(needs, hint="ask for fewer")
    cpu, gpu = caught.value.problems
    assert cpu.startswith("CPU: 5.5 needed at once, the cluster has 4 (1.5 missing): 3 x worker")
    assert gpu == ("GPU: 3 needed at once, the cluster has 0 (3 missing): 3 x worker (1 GPU each)")
    assert "ask for fewer" in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_nobody_answers_for_is_an_error_at_once(address) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        taken = address.format(free.getsockname()[1])  # bound, but nobody listens
        began = time.monotonic()
        with pytest.raises(InputError, match=r"no Ray cluster answers at .*ray start --head"):
            check_reachable(taken)
        assert time.monotonic() - began < 8


@pytest.mark.parametrize("address", ["127.0.0.1", "host:port", "127.0.0.1:"])
def test_an_address_without_a_port_is_named(address) -> None:
    with pytest.raises(InputError, match="HOST:PORT"):
        check_reachable(address)


def test_a_listening_address_and_ray_names_pass() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        check_reachable(f"127.0.0.1:{server.getsockname()[1]}")
    for name in ("auto", "local"):
        check_reachable(name)


@pytest.mark.ray
def test_a_shared_value_is_put_once_and_looked_at_anywhere(ray_cluster) -> None:
    import ray

    shared = Shared({"numbers": np.arange(5)})

    @ray.remote(num_cpus=0)
    def total(there: Shared) -> int:
        value = there.get()["numbers"]
        assert not value.flags.writeable
        return int(value.sum())

    assert ray.get([total.remote(shared), total.remote(shared)]) == [10, 10]
    assert shared.get()["numbers"].tolist() == [0, 1, 2, 3, 4]


START = """
from cytoray.distributed.cluster import connect
from cytoray.errors import InputError
try:
    connect(num_cpus=1)
    print("started")
except InputError as error:
    print("refused:", error)
"""


def frozen_start() -> str:
    """What a start of Ray says whose node is stopped as soon as it is seen."""
    caller = subprocess.Popen(
        [sys.executable, "-c", START], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    frozen: list[psutil.Process] = []
    try:
        me = psutil.Process(caller.pid)
        while not frozen and caller.poll() is None:
            frozen = [p for p in me.children(recursive=True) if p.name() == "raylet"]
            for process in frozen:
                process.suspend()
        assert frozen
        said = caller.communicate(timeout=120)[0].splitlines(keepends=True)
        return "".join(line for line in said if "logging.cc" not in line)
    finally:
        for process in frozen:
            if process.is_running():
                process.kill()
        caller.kill()


@pytest.mark.drill
def test_a_ray_that_does_not_start_is_one_message() -> None:
    """Its node is stopped as soon as it is born: as on a machine too busy to start it in time.

    Where the node is quicker than this test, that is tried again.
    """
    said = next((said for _ in range(3) if (said := frozen_start()) != "started\n"), "")
    assert said.startswith("refused: Ray did not start "), said
    assert "too busy" in said


def test_another_reason_of_ray_not_to_start_is_told(monkeypatch, tmp_path) -> None:
    """A temporary folder whose sockets' paths would be too long."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 30)))
    done = subprocess.run(
        [sys.executable, "-c", START], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("refused: Ray did not start ("), done.stdout + done.stderr


HANGING = """
import atexit, os, time
import ray
from cytoray.distributed.cluster import connect

@ray.remote(num_cpus=0)
class Worker:
    def pid(self):
        atexit.register(time.sleep, 1000)
        return os.getpid()

connect(num_cpus=1)
worker = Worker.remote()
print(ray.get(worker.pid.remote()), flush=True)
worker.__ray_terminate__.remote()
time.sleep(1)
"""


def test_a_worker_that_hangs_in_its_exit_ends_with_the_driver() -> None:
    driver = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=120
    )
    assert driver.returncode == 0, driver.stderr
    pid = int(driver.stdout)
    with suppress(psutil.NoSuchProcess):  # what one hopes for
        worker = psutil.Process(pid)
        try:
            worker.wait(timeout=5)
        finally:
            worker.kill()
