from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytoray.distributed.pieces import Piece, do_piece, read_piece, run_pieces
from cytoray.errors import InputError


def halve(piece: Piece, shared: float) -> dict[str, Any]:
    """Fails for the payloads 13 and 14; counts how often it ran."""
    tries = Path(piece.folder) / "tries"
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if piece.payload == 13:
        raise InputError("13 brings bad luck", ["take 12"])
    if piece.payload == 14:
        raise ZeroDivisionError("14")
    return {"value": np.float64(piece.payload / shared), "run_id": piece.run_id, "nan": np.nan}


def pieces(folder: Path, *payloads: int) -> list[Piece]:
    return [Piece(key=f"p{n}", folder=str(folder / f"p{n}"), payload=n) for n in payloads]


def test_a_result_is_plain_and_written_last(tmp_path) -> None:
    [piece] = pieces(tmp_path, 3)
    assert read_piece(piece) is None
    assert do_piece(halve, piece, 2.0) == {"value": 1.5, "run_id": "", "nan": None}
    assert read_piece(piece) == json.loads((tmp_path / "p3" / "result.json").read_text())
    [bad] = pieces(tmp_path, 13)
    with pytest.raises(InputError):
        do_piece(halve, bad, 2.0)
    assert read_piece(bad) is None


@pytest.mark.ray
def test_finished_pieces_are_not_run_again_and_failures_stop_nobody(ray_cluster, tmp_path) -> None:
    work = pieces(tmp_path, 1, 13, 2, 14, 3)
    do_piece(halve, work[0], 2.0)
    ended: list[tuple[str, bool]] = []
    counts: list[tuple[int, int]] = []

    def start(piece: Piece) -> Piece:
        return Piece(key=piece.key, folder=piece.folder, payload=piece.payload, run_id="r")

    results, failed = run_pieces(
        work, halve, 2.0, cpus=1.0, max_concurrent=2, on_start=start,
        on_done=lambda piece, result, error: ended.append((piece.key, error == "")),
        on_progress=lambda done, total: counts.append((done, total)),
    )  # fmt: skip
    assert [(r["value"], r["run_id"]) for r in results] == [(0.5, ""), (1.0, "r"), (1.5, "r")]
    assert failed == {
        "p13": "13 brings bad luck\n  - take 12",
        "p14": "ZeroDivisionError: 14",
    }
    assert sorted(ended) == [("p13", False), ("p14", False), ("p2", True), ("p3", True)]
    assert (counts[0], counts[-1]) == ((1, 5), (5, 5))
    assert (tmp_path / "p1" / "tries").read_text() == "x"
