"""A pool of actors that work through many items, any of which may kill the actor it is given to.

Ray Data would do the same, but it keeps figures of every block to the end, so that a million items
grow the driver. Here an actor has one item at a time: a death costs that item and one new actor.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from cytoray.errors import InputError

_WAIT_S = 1.0
_MAX_DEATHS_AT_START = 5


@dataclass(frozen=True)
class Died:
    """The result of an item that cost an actor each time it was tried.

    Attributes:
        times: tries.
        out_of_memory: whether the last one was ended for the memory it took.
    """

    times: int
    out_of_memory: bool = False


@dataclass
class _Pool:
    """Actors by what they do: pending answers lead to those that start and those that work."""

    start: Callable[[float], Any]
    max_actors: int
    starting: dict[Any, Any] = field(default_factory=dict)
    idle: list[Any] = field(default_factory=list)
    busy: dict[Any, tuple[Any, int]] = field(default_factory=dict)
    deaths_at_start: int = 0

    def grow(self, items_left: int) -> None:
        """Start as many actors as there is use and room for."""
        cpus = ray.cluster_resources().get("CPU", 1.0)
        wanted = min(items_left, self.max_actors or max(1, int(cpus)))
        for _ in range(wanted - len(self.starting) - len(self.idle) - len(self.busy)):
            actor = self.start(min(1.0, cpus))
            self.starting[actor.ready.remote()] = actor

    def give(self, item: int) -> None:
        """Give an item to an idle actor."""
        actor = self.idle.pop()
        self.busy[actor.work.remote(item)] = actor, item

    def answers(self) -> list[Any]:
        """References that are ready, after a moment's wait if need be."""
        pending = [*self.starting, *self.busy]
        ray.wait(pending, num_returns=1, timeout=_WAIT_S)
        return ray.wait(pending, num_returns=len(pending), timeout=0)[0]

    def started(self, ref: Any) -> None:
        """Take in the first answer of an actor; one that died is replaced with the next `grow`."""
        actor = self.starting.pop(ref)
        try:
            ray.get(ref)
        except RayActorError as error:
            self.deaths_at_start += 1
            if error.actor_init_failed or self.deaths_at_start >= _MAX_DEATHS_AT_START:
                reason = str(error).strip().splitlines()[-1]
                raise InputError(f"the indexing processes cannot start: {reason}") from error
            return
        self.deaths_at_start = 0
        self.idle.append(actor)

    def finished(self, ref: Any) -> tuple[int, Any]:
        """An item and its result, or the error that its actor died of."""
        actor, item = self.busy.pop(ref)
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
        except RayError as error:
            ray.kill(actor)  # it may be out of reach only
            return item, error
        self.idle.append(actor)
        return item, result

    def stop(self) -> None:
        """End all actors."""
        for actor in (*self.starting.values(), *self.idle, *(a for a, _ in self.busy.values())):
            ray.kill(actor)


def run_pool(
    items: Sequence[int] | np.ndarray,
    start: Callable[[float], Any],
    *,
    max_actors: int = 0,
    tries: int = 2,
) -> Iterator[tuple[int, Any]]:
    """Hand every item to an actor of a pool, and yield the results as they come.

    Args:
        items: numbers; an array of a million is fine.
        start: num_cpus -> a new actor with the remote methods `ready()` and `work(item)`, neither
            restarted nor retried by Ray.
        max_actors: actors at most. Those that find no room wait for further nodes, and show an
            autoscaler what is wanted. 0: as many as the cluster has CPUs at the time.
        tries: actors an item may cost; then it is given up.

    Yields:
        (item, what `work` returned, or `Died`), in no order. An actor that died is replaced, and
        its item is tried at once on another one; that is no try when the actor's node was lost.

    Raises:
        InputError: actors cannot start, or `work` raised one.
    """
    queue, again = iter(items), deque[int]()
    left = len(items)
    deaths: Counter[int] = Counter()
    pool = _Pool(start, max_actors)
    try:
        while left:
            pool.grow(left)
            while pool.idle:
                item = again.popleft() if again else next(queue, None)
                if item is None:
                    break
                pool.give(int(item))
            for ref in pool.answers():
                if ref in pool.starting:
                    pool.started(ref)
                    continue
                item, result = pool.finished(ref)
                if isinstance(result, RayError):
                    deaths[item] += not _node_was_lost(result)
                    if deaths[item] < tries:
                        again.append(item)
                        continue
                    result = Died(deaths[item], isinstance(result, OutOfMemoryError))
                left -= 1
                yield item, result
    finally:
        pool.stop()


def _node_was_lost(error: RayError) -> bool:
    return isinstance(error, RayActorError) and (error.preempted or "node has died" in str(error))
