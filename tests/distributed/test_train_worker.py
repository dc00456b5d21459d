"""Taking a run up again from what its folder holds; no Ray is started."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cytoray.config import to_plain
from cytoray.distributed.train_worker import _Place, _restore
from cytoray.errors import InputError
from cytoray.streaming import StreamPosition
from cytoray.training import HeadConfig, PretrainEngine, save_checkpoint

from ..conftest import TINY_VIT, tiny_ssl

DATA = {"tile_px": 64, "mpp": 0.5, "num_tiles": 99}


def settings(**changes: Any) -> Any:
    return SimpleNamespace(ssl=tiny_ssl(**changes), data=DATA)


def engine_of(given: Any) -> PretrainEngine:
    return PretrainEngine(given.ssl, torch.device("cpu"))


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 5 and 10."""
    engine = engine_of(settings())
    for step in (5, 10):
        engine.steps_done = step
        place = _Place(step=step, tiles=8 * step, position=StreamPosition(window=step))
        state = {"engine": engine.state_dict(), "place": to_plain(place), "data": DATA}
        save_checkpoint(tmp_path, step, state)
    return tmp_path


def test_nothing_there_is_the_start(tmp_path) -> None:
    assert _restore(engine_of(settings()), tmp_path, settings()) == (_Place(), [])


def test_a_damaged_checkpoint_is_passed_over_and_said(saved) -> None:
    """One byte changed and the size kept: only the hash tells."""
    place, skipped = _restore(engine_of(settings()), saved, settings())
    assert (place.step, place.position.window, skipped) == (10, 10, [])
    file = saved / "step_00000010" / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    place, skipped = _restore(engine_of(settings()), saved, settings())
    assert (place.step, place.tiles) == (5, 40)
    [said] = skipped
    assert "step_00000010" in said
    assert "has changed since it was written" in said


def test_another_model_is_named_and_not_loaded(saved) -> None:
    head = replace(HeadConfig(), out_dim=32, hidden_dim=64, bottleneck_dim=32)
    backbone = replace(tiny_ssl().backbone, kwargs=TINY_VIT | {"depth": 3})
    other = settings(head=head, backbone=backbone)
    with pytest.raises(InputError) as caught:
        _restore(engine_of(other), saved, other)
    message = str(caught.value)
    assert "holds another model" in message
    assert "ssl.head.out_dim: 64 -> 32" in message
    assert "ssl.backbone.kwargs.depth: 2 -> 3" in message
    assert "size mismatch" not in message


def test_another_index_is_refused(saved) -> None:
    other = settings()
    other.data = DATA | {"num_tiles": 100}
    with pytest.raises(InputError, match=r"num_tiles: 99 -> 100"):
        _restore(engine_of(other), saved, other)
