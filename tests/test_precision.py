"""Which precision is chosen for a device."""

import pytest
import torch
import torch.nn.functional as F

from cytoray import precision
from cytoray.precision import autocast, has_native_bf16, resolve_precision

CPU = torch.device("cpu")


@pytest.fixture
def cpu_with(monkeypatch):
    """Say what the CPU has in hardware."""

    def say(*, avx512: bool, amx: bool) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        has_native_bf16.cache_clear()

    yield say
    monkeypatch.undo()
    has_native_bf16.cache_clear()


@pytest.mark.parametrize(
    ("avx512", "amx", "chosen"),
    [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")],
)
def test_auto_is_bf16_on_a_cpu_that_multiplies_it(cpu_with, avx512, amx, chosen):
    cpu_with(avx512=avx512, amx=amx)
    assert resolve_precision("auto", CPU) == chosen
    with autocast("auto", CPU):
        product = F.linear(torch.ones(2, 3), torch.ones(4, 3))
    assert product.dtype == (torch.bfloat16 if chosen == "bf16" else torch.float32)


def test_what_was_asked_for_is_kept(cpu_with):
    cpu_with(avx512=True, amx=True)
    assert [resolve_precision(name, CPU) for name in precision.PRECISIONS[1:]] == ["fp32", "bf16"]
    with autocast("fp32", CPU):
        assert F.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype == torch.float32


def test_the_processor_tells_the_truth():
    """Linux lists what the processor can do; PyTorch may know no more than that."""
    try:
        flags = open("/proc/cpuinfo", encoding="utf-8").read()  # noqa: SIM115
    except FileNotFoundError:
        pytest.skip("needs /proc/cpuinfo")
    if has_native_bf16("cpu"):
        assert "avx512_bf16" in flags or "amx_tile" in flags
