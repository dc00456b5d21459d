import os
import resource
import shutil
import threading

import pytest
import timm
import torch

from cytoray.errors import InputError
from cytoray.models.encoder import EncoderSpec, load_encoder, weights_id
from cytoray.training import checkpoint as module
from cytoray.training.checkpoint import (
    BackgroundCheckpointer,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    snapshot,
)

KWARGS = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}
SPEC = EncoderSpec(
    architecture="vit_tiny_patch16_224",
    img_px=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    patch_px=16,
    embed_dim=32,
    kwargs=KWARGS,
)


def _state(value):
    return {"w": torch.full((3,), float(value)), "nested": [{"a": 1, "b": None}, (2.0, "x")]}


def test_round_trip_with_encoder(tmp_path):
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=0, **KWARGS).state_dict()
    saved = save_checkpoint(tmp_path, 12, _state(7), (weights, SPEC))
    assert saved.path.name == "step_00000012"
    found = latest_checkpoint(tmp_path, hashes=True)
    assert found.checkpoint == saved
    assert found.skipped == ()
    state = load_checkpoint(saved.path)
    assert torch.equal(state["w"], torch.full((3,), 7.0))
    assert state["nested"] == [{"a": 1, "b": None}, (2.0, "x")]
    assert load_encoder(saved.path).encoder_id == weights_id(weights)
    assert load_encoder(saved.encoder).spec == SPEC
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000012"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 1, _state(1))
    save_checkpoint(tmp_path, 1, _state(2))
    assert load_checkpoint(tmp_path / "step_00000001")["w"][0] == 2.0
    assert len(list(tmp_path.iterdir())) == 1


def _truncate(path):
    data = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(data[: len(data) // 2])


DAMAGES = {
    "no marker": (lambda p: (p / "COMPLETE").unlink(), "COMPLETE is not there"),
    "half a marker": (lambda p: (p / "COMPLETE").write_text('{"step"'), "cannot be read"),
    "no state": (lambda p: (p / "state.pt").unlink(), "state.pt is not there"),
    "half a state": (_truncate, "bytes, not"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_half_written_checkpoint_is_passed_over_and_said(tmp_path, kind):
    for step in (5, 9, 10):
        save_checkpoint(tmp_path, step, _state(step))
    damage, words = DAMAGES[kind]
    damage(tmp_path / "step_00000010")
    found = latest_checkpoint(tmp_path)
    assert found.checkpoint is not None
    assert found.path == tmp_path / "step_00000009"
    assert found.checkpoint.step == 9
    assert len(found.skipped) == 1
    assert "step_00000010" in str(found.skipped[0])
    assert words in found.skipped[0].reason
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "step_00000010")


def test_changed_bytes_are_found_by_the_hash(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, _state(step))
    file = tmp_path / "step_00000002" / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    assert latest_checkpoint(tmp_path, hashes=True).path == tmp_path / "step_00000001"
    with pytest.raises(CheckpointError, match="changed"):
        load_checkpoint(tmp_path / "step_00000002")


def test_nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path / "none").checkpoint is None
    with pytest.raises(InputError, match="no checkpoint folder"):
        load_checkpoint(tmp_path / "none")


def test_only_plain_values(tmp_path):
    with pytest.raises(InputError, match=r"state\['a'\]\[1\] is a set"):
        save_checkpoint(tmp_path, 1, {"a": [1, {2}]})
    assert latest_checkpoint(tmp_path).checkpoint is None


def test_a_write_that_is_killed_leaves_no_step_folder(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, _state(1))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "replace_folder", stop)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill cleans nothing up
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, _state(2))
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path).path == tmp_path / "step_00000001"
    assert len(list(tmp_path.iterdir())) == 2
    saver = BackgroundCheckpointer(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # only who writes may clean
    saver.save(3, _state(3))
    saver.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_background_write_holds_a_snapshot_and_keeps_the_newest(tmp_path):
    state = _state(0)
    with BackgroundCheckpointer(tmp_path, keep_last=2) as saver:
        for step in range(1, 5):
            state["w"].fill_(step)
            saver.save(step, state)
            state["w"].fill_(-1)
        written = saver.wait()
    assert written is not None
    assert written.step == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    for step in (3, 4):
        loaded = load_checkpoint(tmp_path / f"step_{step:08d}")
        assert torch.equal(loaded["w"], torch.full((3,), float(step)))


def test_background_encoder_says_its_step(tmp_path):
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=0, **KWARGS).state_dict()
    with BackgroundCheckpointer(tmp_path, encoder=SPEC) as saver:
        saver.save(3, _state(1), weights)
    assert load_encoder(tmp_path / "step_00000003").spec.source == {"step": 3}
    with pytest.raises(InputError, match="description"):
        BackgroundCheckpointer(tmp_path).save(4, _state(1), weights)


def test_writing_happens_beside_the_caller(tmp_path, monkeypatch):
    gate, seen = threading.Event(), []
    write = module.save_checkpoint

    def slow(*arguments):
        gate.wait(10)
        seen.append(threading.current_thread().name)
        return write(*arguments)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    saver = BackgroundCheckpointer(tmp_path)
    saver.save(1, _state(1))
    assert latest_checkpoint(tmp_path).checkpoint is None
    gate.set()
    saver.close()
    assert seen == ["checkpoint-1"]
    assert latest_checkpoint(tmp_path).checkpoint is not None


def test_an_error_of_the_writer_surfaces(tmp_path):
    saver = BackgroundCheckpointer(tmp_path / "runs")
    (tmp_path / "runs").write_text("a file where the folder should be")
    saver.save(1, _state(1))
    with pytest.raises(CheckpointError, match="could not be written"):
        saver.wait()
    os.unlink(tmp_path / "runs")
    saver.save(2, _state(2))
    saver.close()
    assert latest_checkpoint(tmp_path / "runs").path == tmp_path / "runs" / "step_00000002"


def test_a_full_disk_is_said_and_harms_nothing(tmp_path):
    """A limit on the size of files stands for the disk: the write really breaks off half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with BackgroundCheckpointer(tmp_path) as saver:
        saver.save(1, _state(1))
        saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            saver.save(2, {"w": torch.zeros(1_000_000)})
            with pytest.raises(CheckpointError, match=r"step 2.*4\.0 MB are needed.*Make room"):
                saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = latest_checkpoint(tmp_path, hashes=True)
    assert found.path == tmp_path / "step_00000001"
    assert len(list(tmp_path.iterdir())) == 1


def test_snapshot_shares_nothing():
    tensor = torch.arange(6.0).view(2, 3).T
    copy = snapshot({"t": tensor, "n": [tensor, 3]})
    tensor.zero_()
    assert copy["t"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert copy["n"][1] == 3
