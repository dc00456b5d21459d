from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import Any

import pytest
import ray

from cytoray.distributed.pool import Died, run_pool
from cytoray.errors import InputError

pytestmark = pytest.mark.ray

DEADLY, DEADLY_ONCE, WRONG = 3, 5, 99


class Worker:
    """Doubles a number, but for those that kill it."""

    def __init__(self, folder: str, broken: bool = False) -> None:
        if broken:
            raise InputError("no such detector")
        self.folder = folder
        self.mark("start")

    def mark(self, what: str) -> None:
        open(f"{self.folder}/{what}-{os.getpid()}-{time.monotonic_ns()}", "w").close()

    def ready(self) -> None: ...

    def work(self, item: int) -> tuple[int, int]:
        if item == WRONG:
            raise InputError("wrong settings")
        self.mark(f"try{item}")
        tried = sum(name.startswith(f"try{item}-") for name in os.listdir(self.folder))
        if item == DEADLY or (item == DEADLY_ONCE and tried == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * item, os.getpid()


def starter(folder: Any, **changes: Any):
    kind: Any = ray.remote(Worker)

    def start(num_cpus: float) -> Any:
        options = {"num_cpus": num_cpus, "max_restarts": 0, "max_task_retries": 0}
        return kind.options(**options).remote(str(folder), **changes)

    return start


def test_a_death_costs_one_actor_and_its_own_item(ray_cluster, tmp_path) -> None:
    """Item 3 kills every actor, item 5 the first: three deaths, an actor for each, all done."""
    results = dict(run_pool(range(12), starter(tmp_path), max_actors=2))
    assert results.pop(DEADLY) == Died(2)
    assert {item: result[0] for item, result in results.items()} == {
        item: 2 * item for item in range(12) if item != DEADLY
    }
    marks = Counter(name.split("-")[0] for name in os.listdir(tmp_path))
    assert marks.pop("start") in (2 + 2, 2 + 3)  # all may be done before the last one is ready
    assert marks.pop(f"try{DEADLY}") == marks.pop(f"try{DEADLY_ONCE}") == 2
    assert set(marks.values()) == {1}  # nobody else was tried twice


def test_actors_are_ended_when_the_results_are_not_wanted_any_more(ray_cluster, tmp_path) -> None:
    results = run_pool(range(10, 1000), starter(tmp_path), max_actors=1)
    pid = next(results)[1][1]
    results.close()
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")
    assert list(run_pool([], starter(tmp_path))) == []


def test_what_the_user_got_wrong_is_said_once(ray_cluster, tmp_path) -> None:
    with pytest.raises(InputError, match="no such detector"):
        list(run_pool(range(4), starter(tmp_path, broken=True)))
    with pytest.raises(InputError) as caught:
        list(run_pool([1, WRONG], starter(tmp_path), max_actors=1))
    assert str(caught.value) == "wrong settings"
