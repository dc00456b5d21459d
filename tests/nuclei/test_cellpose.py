from __future__ import annotations

import numpy as np
import pytest

from cytoray.errors import InputError
from cytoray.nuclei import build_detector, find_weights, masks_to_nuclei


def test_masks_to_nuclei():
    masks = np.zeros((60, 80), np.int32)
    y, x = np.mgrid[:60, :80]
    masks[(x - 20) ** 2 + (y - 30) ** 2 <= 8**2] = 3
    masks[40:44, 60:70] = 7
    confidence = np.where(masks == 3, 0.9, 0.4)
    nuclei = masks_to_nuclei(masks, confidence, 0.5)
    assert nuclei.dtype == np.float32
    assert nuclei[:, :2].tolist() == [[20.0, 30.0], [64.5, 41.5]]
    assert nuclei[:, 2] == pytest.approx([4.0, 0.5 * np.sqrt(40 / np.pi)], rel=0.02)
    assert nuclei[:, 3] == pytest.approx([0.9, 0.4])


def test_no_masks():
    assert masks_to_nuclei(np.zeros((5, 5), np.uint16), np.zeros((5, 5)), 0.5).shape == (0, 4)


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
    with pytest.raises(InputError) as caught:
        build_detector("cellpose")
    for part in ("cpsam_v2", str(tmp_path), "huggingface.co/mouseland/cellpose-sam", "weights"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match=r"my\.pt"):
        build_detector("cellpose", weights=tmp_path / "my.pt")


def test_weights_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
    (tmp_path / "cpsam_v2").write_bytes(b"x")
    (tmp_path / "mine.pt").write_bytes(b"x")
    assert find_weights() == tmp_path / "cpsam_v2"
    assert find_weights("mine.pt") == tmp_path / "mine.pt"
    assert find_weights(tmp_path / "mine.pt") == tmp_path / "mine.pt"


def test_file_that_is_no_weights(tmp_path):
    import torch

    (tmp_path / "text.pt").write_bytes(b"these are not weights")
    torch.save({"some.weight": torch.zeros(2)}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(InputError, match=f"{name} could not be loaded"):
            build_detector("cellpose", weights=tmp_path / name)


@pytest.mark.slow
def test_network_with_random_weights_runs(tmp_path):
    import torch
    from cellpose.vit import CPSAM

    torch.manual_seed(0)
    torch.save(CPSAM(dtype=torch.bfloat16).state_dict(), tmp_path / "random.pt")
    detect = build_detector("cellpose", weights=tmp_path / "random.pt", device="cpu")
    found = detect(np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8), 0.5)
    assert detect.name == "cellpose"
    assert found.dtype == np.float32
    assert found.ndim == 2
    assert found.shape[1] == 4
    assert np.isfinite(found).all()
