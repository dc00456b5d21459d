"""SimCLR, MoCo and BYOL give the same step on one rank and on two (gloo processes)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cytoray.ssl.losses import nt_xent

JOB = Path(__file__).with_name("two_view_ranks_job.py")
_spec = importlib.util.spec_from_file_location("two_view_ranks_job", JOB)
assert _spec is not None
assert _spec.loader is not None
job = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(job)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    started = [
        subprocess.Popen([sys.executable, JOB, str(rank), "2", folder / "store", out])
        for rank, out in enumerate(outs)
    ]
    alone = job.run(0, 1)
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    return alone, [torch.load(out, weights_only=False) for out in outs]


def test_batch_norm_and_nt_xent_are_over_all_ranks(results):
    alone, ranks = (results[0]["parts"], [rank["parts"] for rank in results[1]])
    for name in ("normed", "grad"):
        joined = torch.cat([rank[name] for rank in ranks])
        torch.testing.assert_close(joined, alone[name], atol=1e-6, rtol=1e-5)
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], alone["loss"], atol=1e-6, rtol=1e-6)
    summed = ranks[0]["grad_weight"] + ranks[1]["grad_weight"]
    torch.testing.assert_close(summed, alone["grad_weight"], atol=1e-6, rtol=1e-5)


def test_one_rank_is_torchs_batch_norm(results):
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(job.TILES, 2, 6, generator=generator) * 2 + 5).requires_grad_()
    bias = torch.empty(6).normal_(generator=generator)
    normed = F.batch_norm(rows.flatten(0, 1), None, None, torch.ones(6), bias, training=True)
    nt_xent(normed.unflatten(0, (job.TILES, 2)), temperature=0.2).backward()
    torch.testing.assert_close(results[0]["parts"]["grad"], rows.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(job.configs()))
def test_engine_steps_agree(results, name):
    alone, ranks = results
    expected = alone["engines"][name]
    for rank in ranks:
        got = rank["engines"][name]
        for mine, single in zip(got["metrics"], expected["metrics"], strict=True):
            assert mine.keys() == single.keys()
            for key in single:
                torch.testing.assert_close(mine[key], single[key], atol=1e-5, rtol=1e-4)
        for key, value in expected["model"].items():
            torch.testing.assert_close(
                got["model"][key], value, atol=2e-6, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
    models = [rank["engines"][name]["model"] for rank in ranks]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
