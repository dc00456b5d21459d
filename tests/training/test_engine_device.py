"""What a step asks of its device: no waiting, code made once, the same bits twice."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cytoray.ssl.methods import METHODS
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    LossConfig,
    PretrainConfig,
    PretrainEngine,
    SRConfig,
    TwoViewConfig,
    check_finite,
)

from .test_engine import _assert_same, _batch, _config

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")
# Operations that PyTorch refuses on CUDA where all kernels are to be deterministic.
UNREPEATABLE = (
    "adaptive_avg_pool2d_backward", "avg_pool3d_backward", "bicubic2d_aa_backward",
    "bicubic2d_backward", "bilinear2d_aa_backward", "bincount", "cumsum",
    "grid_sampler_2d_backward",
    "histc", "kthvalue", "median", "put_.", "reflection_pad", "replication_pad", "scatter_reduce",
)  # fmt: skip


class _Watch(TorchDispatchMode):
    """Notes the operations of some names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.names):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _any_method(method: str, **changes) -> PretrainConfig:
    if method in ("simclr", "moco", "byol"):
        changes["crops"] = CropConfig(global_px=64, num_local=0)
        changes["two_views"] = TwoViewConfig(hidden_dim=24, out_dim=12)
    return _config(method=method, **changes)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_nothing_in_a_step_waits_for_the_device(method, accumulate):
    engine = PretrainEngine(_any_method(method, accumulate=accumulate, pack_crops=True), "cpu")
    batch = {"global_crops": torch.randn(6, 2, 3, 64, 64)}
    if engine.config.crops.num_local:
        batch["local_crops"] = torch.randn(6, 2, 3, 32, 32)
    engine.step(batch, 0)
    with _Watch(WAITING) as waits:
        metrics = engine.step(batch, 1)
        assert waits.seen == []
        check_finite(metrics, 1)
    assert waits.seen  # reading a value is what the mode catches


EVA = BackboneConfig(
    name="eva02_tiny_patch14_224",
    kwargs={"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2},
)


@pytest.mark.parametrize(
    ("method", "changes"),
    [*((method, {}) for method in sorted(METHODS)), ("dinov2", {"backbone": EVA})],
)
def test_a_step_can_be_deterministic_on_cuda(method, changes):
    engine = PretrainEngine(_any_method(method, pack_crops=True, **changes), "cpu")
    batches = [_batch(step, num_local=engine.config.crops.num_local) for step in range(2)]
    engine.step(batches[0], 0)  # fills caches
    with _Watch(UNREPEATABLE) as watch:
        engine.step(batches[1], 1)
        assert watch.seen == []
        torch.ones(2).cumsum(0)
    assert watch.seen  # the names are those of the operations


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sr", [SRConfig(), SRConfig(sparse=True, irpe=True, top_h=4)])
def test_cuda_repeats_a_deterministic_run(monkeypatch, sr):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config = _config()
    config = replace(config, backbone=replace(config.backbone, sr=sr))
    torch.use_deterministic_algorithms(True)
    try:
        states = []
        for _ in range(2):
            engine = PretrainEngine(config, "cuda")
            for step in range(4):
                engine.step(_batch(step), step)
            states.append(engine.state_dict()["model"])
    finally:
        torch.use_deterministic_algorithms(False)
    _assert_same(*states)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("centering", "drop_path", "sr"),
    [("centering", 0.0, SRConfig(sparse=True, irpe=True, top_h=4)), ("sinkhorn", 0.2, SRConfig())],
)
def test_compiled_steps_are_the_steps(centering, drop_path, sr):
    config = _any_method("dinov2", pack_crops=True, loss=LossConfig(centering=centering))
    config = replace(config, backbone=replace(config.backbone, drop_path=drop_path, sr=sr))
    found = []
    for compiled in (False, True):
        engine = PretrainEngine(replace(config, compile=compiled), "cpu")
        losses = [float(engine.step(_batch(step), step)["loss"]) for step in range(2)]
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        losses += [float(engine.step(_batch(step), step)["loss"]) for step in range(2, 6)]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"compile": False}])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_cuda_agrees_with_the_cpu_and_is_never_waited_for(method, changes):
    config = _any_method(method, precision="auto", **changes)
    views = config.crops.num_local
    exact = [
        {k: float(v) for k, v in metrics.items()}
        for engine in [PretrainEngine(replace(config, precision="fp32"), "cpu")]
        for metrics in [engine.step(_batch(s, num_local=views), s) for s in range(3)]
    ]
    engine = PretrainEngine(config, "cuda")
    found = [engine.step(_batch(s, num_local=views), s) for s in range(2)]
    batch = _batch(2, num_local=views)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found.append(engine.step(batch, 2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.precision == "bf16"
    for got, expected in zip(found, exact, strict=True):
        assert float(got["loss"]) == pytest.approx(expected["loss"], rel=0.05)
