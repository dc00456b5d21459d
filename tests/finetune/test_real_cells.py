from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cytoray.evaluation.baselines import ColourHistogram
from cytoray.evaluation.protocol import Examples, probe_examples
from cytoray.finetune import cached_pixels, read_cells, split_cells

REAL = os.environ.get("CYTORAY_REAL_DATA")
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not REAL, reason="CYTORAY_REAL_DATA names no folder of real images"),
]


def test_colour_alone_tells_most_cells_by_source_image(tmp_path) -> None:
    cells = read_cells(Path(REAL or "") / "cells" / "labels.csv")
    assert cells.grouped
    split = split_cells(cells)
    assert not set(cells.groups[split.train]) & set(cells.groups[split.test])
    pixels = cached_pixels(cells.paths, 64, tmp_path)
    assert pixels.bad == ()
    features = ColourHistogram()(torch.from_numpy(pixels.open()[:].copy())).numpy()
    examples = Examples(
        names=cells.names, labels=cells.labels, classes=cells.classes, groups=cells.groups,
        split=split,
    )  # fmt: skip
    answers, _ = probe_examples("knn", features, examples)
    accuracy = np.mean(answers.argmax(1) == cells.labels[split.test])
    assert accuracy > 0.7
