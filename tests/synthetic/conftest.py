"""One small synthesized folder, shared by the tests of this package."""

from pathlib import Path

import pytest

from cytoray.synthetic import SynthConfig, synthesize


@pytest.fixture(scope="session")
def config() -> SynthConfig:
    return SynthConfig(num_slides=6, held_out=2, size_px=1024, seed=3)


@pytest.fixture(scope="session")
def folder(config: SynthConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(config, tmp_path_factory.mktemp("synth")).parent
