"""The sample views of a pretraining's report are made as training makes them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cytoray.report.pretraining as module
from cytoray.perturb import CROP_POLICIES, PerturbConfig
from cytoray.report.pretraining import example_views

POLICY = replace(CROP_POLICIES["dino"], num_local=3)


@pytest.fixture
def shown(monkeypatch) -> list[dict]:
    """What is drawn, before it is a picture."""
    rows: list[dict] = []
    draw = module.view_grid
    monkeypatch.setattr(module, "view_grid", lambda made: rows.extend(made) or draw(made))
    return rows


@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize(
    "perturb",
    [PerturbConfig(radius_um=2.0), PerturbConfig(shuffle=False), PerturbConfig(enabled=False)],
)
def test_views_with_and_without_perturbation_and_nuclei_table(
    read_plan, nuclei_dir, shown, perturb, with_table
) -> None:
    """Without a table nuclei are detected where they are needed, and not asked for elsewhere."""
    known = Path(nuclei_dir) if with_table else None
    image = example_views(
        read_plan, known, POLICY, perturb=perturb, detector="classical", global_px=64,
        local_px=32, seed=0, num_tiles=2,
    )  # fmt: skip
    assert image is not None
    assert image.startswith(b"\x89PNG")
    assert len(shown) == 2
    for row in shown:
        changed = (row["original"] != row["perturbed"]).any()
        assert changed == (perturb.enabled and perturb.shuffle)
        assert (len(row["nuclei_xy_px"]) > 0) == (with_table or perturb.enabled)
        assert np.shape(row["global_views"]) == (2, 64, 64, 3)
        assert np.shape(row["local_views"]) == (3, 32, 32, 3)
