from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from cytoray.errors import InputError
from cytoray.nuclei import SmallConfig, SmallDetector
from cytoray.nuclei.small_data import Batch, make_targets
from cytoray.nuclei.small_net import SmallNet
from cytoray.nuclei.train_small import TrainConfig, detection_loss, main, train

TINY = ("--steps", "2", "--batch", "2", "--crop-px", "64", "--slides", "1")


@pytest.fixture
def folders(tmp_path):
    """Three images and their masks."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for stem in ("a", "b", "c"):
        mask = np.zeros((160, 160), np.uint8)
        cv2.circle(mask, (60, 80), 8, 255, -1)
        pixels = np.repeat((240 - mask // 2)[..., None], 3, axis=2)
        cv2.imwrite(str(tmp_path / "images" / f"{stem}.png"), pixels)
        cv2.imwrite(str(tmp_path / "masks" / f"{stem}.png"), mask)
    return ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]


def test_two_steps_write_weights_that_load(tmp_path, folders, capsys):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("b\n")
    out = tmp_path / "out" / "net.safetensors"
    assert main([*TINY, "--out", str(out), *folders, "--hold-out", str(held_out)]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["figures"] == figures
    assert record["held_out"] == ["b"]
    assert record["images"] == 2
    assert record["config"]["steps"] == 2
    assert figures["held_out_images_6um"]["nuclei"] == 1
    found = SmallDetector(SmallConfig(weights=out))(np.full((64, 64, 3), 230, np.uint8), 0.5)
    assert found.shape == (0, 4)


def test_users_mistakes_end_with_2(tmp_path, folders, capsys):
    out = ["--out", str(tmp_path / "net.safetensors")]
    assert main([*out, "--crop-px", "50", "--steps", "0"]) == 2
    message = capsys.readouterr().err
    assert "crop_px" in message
    assert "steps" in message
    assert main([*out, "--images", str(tmp_path)]) == 2
    assert main([*out, *folders, "--hold-out", str(tmp_path / "nowhere.txt")]) == 2
    unknown = tmp_path / "held_out.txt"
    unknown.write_text("a z\n")
    capsys.readouterr()
    assert main([*out, *folders, "--hold-out", str(unknown)]) == 2
    assert "z" in capsys.readouterr().err
    assert not (tmp_path / "net.safetensors").exists()


def test_the_same_seed_gives_the_same_net():
    config = TrainConfig(steps=2, batch=2, crop_px=64, slides=1)
    one, other = (train(config).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_config_lists_every_problem():
    with pytest.raises(InputError) as caught:
        TrainConfig(steps=0, batch=0, slides=0, slide_share=0.7, image_share=0.7, learning_rate=0)
    assert len(caught.value.problems) == 5


def batch_of(nuclei: np.ndarray) -> Batch:
    heat, log_radius, centre = make_targets(nuclei, 64)
    return Batch(
        density=np.zeros((1, 64, 64, 3), np.float32),
        heat=heat[None],
        log_radius=log_radius[None],
        centre=centre[None],
    )


def test_the_loss_is_that_of_the_paper():
    batch = batch_of(np.array([(20, 30, 6), (44, 40, 9)], np.float32))
    output = torch.randn(1, 2, 32, 32, generator=torch.manual_seed(0))
    centres, radii = detection_loss(output, batch)
    likely = 1 / (1 + np.exp(-output[0, 0].double().numpy()))
    expected, far = 0.0, []
    for row in range(32):
        for column in range(32):
            p, y = likely[row, column], float(batch.heat[0, row, column])
            if batch.centre[0, row, column]:
                expected -= (1 - p) ** 2 * np.log(p)
            else:
                expected -= (1 - y) ** 4 * p**2 * np.log(1 - p)
            wanted = batch.log_radius[0, row, column]
            if np.isfinite(wanted):
                gap = abs(float(output[0, 1, row, column]) - wanted)
                far.append(gap**2 / 0.4 if gap < 0.2 else gap - 0.1)
    assert float(centres) == pytest.approx(expected / 2, rel=1e-4)
    assert float(radii) == pytest.approx(np.mean(far), rel=1e-4)


def test_a_field_without_nuclei_teaches_too():
    net = SmallNet()
    centres, radii = detection_loss(net(torch.zeros(1, 3, 64, 64)), batch_of(np.zeros((0, 3))))
    (centres + radii).backward()
    assert centres.item() > 0
    assert radii.item() == 0
