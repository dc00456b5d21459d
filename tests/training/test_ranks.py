"""A step over the same global batch is the same on one rank and on two (gloo processes)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cytoray.errors import InputError
from cytoray.training import PretrainEngine

JOB = Path(__file__).with_name("ranks_job.py")
_spec = importlib.util.spec_from_file_location("ranks_job", JOB)
assert _spec is not None
assert _spec.loader is not None
ranks_job = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks_job)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    started = [
        subprocess.Popen([sys.executable, JOB, str(rank), "2", folder / "store", out])
        for rank, out in enumerate(outs)
    ]
    alone = ranks_job.run(0, 1)
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    return alone, [torch.load(out, weights_only=False) for out in outs]


def test_sinkhorn_and_centre_are_over_all_ranks(results):
    alone, ranks = results
    for name in ("sinkhorn", "centred", "koleo_grad"):
        joined = torch.cat([r["losses"][name] for r in ranks])
        torch.testing.assert_close(joined, alone["losses"][name], atol=1e-6, rtol=1e-5)
    for name in ("centre", "koleo"):
        for rank in ranks:
            torch.testing.assert_close(rank["losses"][name], alone["losses"][name])
    empty = ranks[1]["losses"]["none_here"]
    assert empty.shape == (0, 20)
    torch.testing.assert_close(ranks[0]["losses"]["none_here"], alone["losses"]["sinkhorn"])


@pytest.mark.parametrize("name", sorted(ranks_job.engine_configs()))
def test_engine_steps_agree(results, name):
    alone, ranks = results
    expected = alone["engines"][name]
    for rank in ranks:
        got = rank["engines"][name]
        for step, (mine, single) in enumerate(
            zip(got["metrics"], expected["metrics"], strict=True)
        ):
            assert mine.keys() == single.keys()
            for key in single:
                torch.testing.assert_close(
                    mine[key],
                    single[key],
                    atol=1e-5,
                    rtol=1e-4,
                    msg=lambda m, k=key, s=step: f"{k} at {s}: {m}",
                )
    found = [rank["engines"][name]["state"] for rank in ranks]
    for key, tensor in expected["state"]["model"].items():
        torch.testing.assert_close(found[0]["model"][key], tensor, atol=1e-5, rtol=1e-5)
    if ranks[0]["engines"][name]["sharding"] == "ddp":
        model = [state["model"] for state in found]
        assert all(torch.equal(model[0][key], model[1][key]) for key in model[0])
    else:  # rank 0 alone holds what has been put together
        assert not any(found[1]["model"][key].numel() for key in found[1]["model"] if "vit" in key)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_checkpoint_serves_the_other_sharding(results, sharding):
    alone, ranks = results
    expected = alone["engines"]["dinov2"]["metrics"][2]
    for rank in ranks:
        for key, value in expected.items():
            torch.testing.assert_close(
                rank["resumed"][sharding][key], value, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: k
            )


def test_a_sharded_checkpoint_serves_one_rank(results):
    alone, ranks = results
    engine = PretrainEngine(ranks_job.config(), "cpu")
    engine.load_state_dict(ranks[0]["engines"]["fsdp"]["state"])
    other = PretrainEngine(ranks_job.config(), "cpu")
    other.load_state_dict(alone["engines"]["dinov2"]["state"])
    batch = ranks_job.global_batch(ranks_job.STEPS)
    one, two = (e.step(batch, ranks_job.STEPS) for e in (engine, other))
    torch.testing.assert_close(one["loss"], two["loss"], atol=1e-5, rtol=1e-5)


def test_the_steps_change_the_weights(results):
    for name, settings in ranks_job.engine_configs().items():
        fresh = PretrainEngine(settings, "cpu").method.state_dict()
        trained = results[0]["engines"][name]["state"]["model"]
        moved = {k for k in fresh if not torch.equal(fresh[k], trained[k])}
        assert "student.backbone.vit.blocks.0.attn.qkv.weight" in moved
        assert "student.cls_head.last_layer.weight" in moved
        assert "teacher.backbone.vit.blocks.0.attn.qkv.weight" in moved
        assert ("student.backbone.mask_token" in moved) == (name != "dino")


def test_ranks_need_a_process_group():
    with pytest.raises(InputError, match="init_process_group"):
        PretrainEngine(ranks_job.config(), "cpu", rank=1, world_size=2)
