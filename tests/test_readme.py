"""What README shows must work as it is written."""

import re
from pathlib import Path

import numpy as np
import torch

README = Path(__file__).parents[1] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run_block(containing: str, names: dict) -> dict:
    block = next(b for b in python_blocks() if containing in b)
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_reading_a_slide(tmp_path, monkeypatch) -> None:
    from cytoray.synthetic import SynthConfig, make_slide, write_pyramid

    config = SynthConfig(num_slides=1, size_px=1024, held_out=0)
    write_pyramid(tmp_path / "case_001.svs", make_slide(config, 0).pixels, mpp=0.25)
    monkeypatch.chdir(tmp_path)
    names = run_block("open_slide", {})
    assert names["chunk"].pixels.shape == (448, 448, 3)
    assert names["nuclei"].shape[1] == 4


def test_the_new_aggregator_of_the_extend_section() -> None:
    block = next(b for b in python_blocks() if "class TopMean" in b)
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    names = run_block("class TopMean", {})
    aggregator = names["TopMean"](3, 2)
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32))
    output = aggregator(features, torch.tensor([0, 5, 7]))
    assert output.logits.shape == (2, 2)
    kept = features[:5][features[:5].norm(dim=1).topk(3).indices].mean(0)
    torch.testing.assert_close(output.logits[0], aggregator.head(kept))
    assert output.attention[:5].sum() == 1
    assert output.attention[5:].sum() == 1


def test_every_shown_name_can_be_imported() -> None:
    for block in python_blocks():
        for line in block.splitlines():
            if line.startswith("from cytoray"):
                exec(line, {})


def test_every_command_shown_is_a_job() -> None:
    from pipelines.cli import JOBS

    text = README.read_text(encoding="utf-8")
    fenced = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    shown = re.findall(r"^cytoray +([a-z]+)", "\n".join(fenced), re.MULTILINE)
    shown += re.findall(r"^\| `cytoray ([a-z]+)", text, re.MULTILINE)
    assert len(shown) > 10
    assert set(shown) == set(JOBS)
