from __future__ import annotations

import pytest

from cytoray.runs import append_event
from cytoray.streaming.ledger import ledger_path, ledger_problems, used_tiles


def write(folder, attempt: str, step: int, shares: list[list[str]]) -> None:
    for rank, ids in enumerate(shares):
        append_event(ledger_path(folder, rank), {"attempt": attempt, "step": step, "tile_ids": ids})


def start(folder, attempt: str, step: int, world: int) -> None:
    event = {"event": "start", "attempt": attempt, "step": step, "world": world}
    append_event(folder / "events.jsonl", event)


def test_steps_taken_again_replace_those_that_were_undone(tmp_path) -> None:
    """Killed after step 3 with the checkpoint of step 1; then two workers."""
    start(tmp_path, "a", 0, 1)
    for step, ids in enumerate((["1", "2"], ["3", "4"], ["5", "6"]), 1):
        write(tmp_path, "a", step, [ids])
    start(tmp_path, "b", 1, 2)
    write(tmp_path, "b", 2, [["3"], ["4"]])
    write(tmp_path, "b", 3, [["5"], ["6"]])
    write(tmp_path, "b", 4, [["2"], ["1"]])
    steps = used_tiles(tmp_path)
    assert steps == [["1", "2"], ["3", "4"], ["5", "6"], ["2", "1"]]
    assert ledger_problems(steps, [str(i) for i in range(1, 7)]) == []


def test_a_missing_share_is_said(tmp_path) -> None:
    start(tmp_path, "a", 0, 2)
    write(tmp_path, "a", 1, [["1"]])
    with pytest.raises(ValueError, match=r"step 1 has the tiles of workers \[0\] of 2"):
        used_tiles(tmp_path)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([["1", "2"], ["2", "4"]], "used more than once"),
        ([["1", "2"], ["3", "5"]], "not of this data"),
        ([["1", "2"], ["2", "4"]], "1 tiles not used"),
    ],
)
def test_faults_of_an_order(steps, words) -> None:
    assert any(words in problem for problem in ledger_problems(steps, ["1", "2", "3", "4"]))
