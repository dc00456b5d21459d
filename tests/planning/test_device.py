from __future__ import annotations

import pytest

from cytoray.planning import flops_per_tile
from cytoray.planning.device import bound_rate, crop_flops, measure_encoder, measure_training
from cytoray.training import BackboneConfig, PretrainConfig

from ..conftest import tiny_ssl


def vit_flops(crop_px: int, width: int, depth: int, patch_px: int = 16) -> float:
    """A plain ViT by the textbook: 12 D^2 a token and block, and twice N^2 D for attention."""
    patches = (crop_px // patch_px) ** 2
    tokens = patches + 1
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    return 2.0 * (depth * block + patches * 3 * patch_px**2 * width)


def test_flops_are_those_of_the_textbook() -> None:
    config = PretrainConfig()  # ViT-tiny, 2 x 224 and 8 x 96
    big, small = vit_flops(224, 192, 12), vit_flops(96, 192, 12)
    name = config.backbone.name
    assert crop_flops(name, 224, config) == pytest.approx(big, rel=0.01)
    assert crop_flops(name, 96, config) == pytest.approx(small, rel=0.01)
    assert flops_per_tile(config) == pytest.approx(3 * (2 * big + 8 * small) + 2 * big, rel=0.01)


def test_the_bound_of_a_large_run() -> None:
    """UniCAS' ViT-L: about 1,540 GFLOP a tile by the run's own note."""
    config = PretrainConfig(backbone=BackboneConfig(name="vit_large_patch16_224"))
    flops = flops_per_tile(config)
    assert flops == pytest.approx(1540e9, rel=0.02)
    rate = bound_rate(flops, "H200")
    assert rate.tiles_per_s == pytest.approx(989e12 / flops)
    assert rate.is_bound
    assert "not an estimate" in rate.what


def test_rates_are_measured_for_real() -> None:
    rate = measure_training(tiny_ssl(), 64, batch=4, steps=2)
    assert rate.source == "measured"
    assert not rate.is_bound
    assert 0.1 < rate.tiles_per_s < 1e6
    assert measure_encoder("vit_tiny_patch16_224", 32, 4, 2).tiles_per_s > rate.tiles_per_s
