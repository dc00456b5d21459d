import pytest
import torch

from cytoray.device_peaks import peak_of_device, try_cpu


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_model_is_found_by_its_whole_name(name: str, tflops: float | None) -> None:
    assert peak_of_device(name) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trying_the_cpu_leaves_its_threads_as_they_were(precision: str) -> None:
    before = torch.get_num_threads()
    assert 1e8 < try_cpu(precision, 1) < 1e14  # between a very old core and a very large GPU
    assert torch.get_num_threads() == before
