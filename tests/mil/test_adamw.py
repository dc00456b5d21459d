import subprocess
import sys

import pytest
import torch

from cytoray.mil.adamw import AdamW


def two_sets_of_parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (3,), (2, 2)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [[torch.nn.Parameter(value.clone()) for value in values] for _ in range(2)]


def test_steps_are_those_of_torch():
    ours, theirs = two_sets_of_parameters()
    groups = [
        [
            {"params": params[:2], "lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.95)},
            {"params": params[2:], "lr": 0.01},
        ]
        for params in (ours, theirs)
    ]
    optimisers = AdamW(groups[0]), torch.optim.AdamW(groups[1])
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for optimiser in optimisers:
            optimiser.zero_grad()
            optimiser.param_groups[0]["lr"] = 0.1 / (step + 1)
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if index == 1 and step in (0, 3):
                continue  # a head without a label in this batch
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.data, b.data, rtol=1e-6, atol=1e-6)
    assert all(p.grad is not None for p in ours[:1])
    optimisers[0].zero_grad()
    assert all(p.grad is None for p in ours)


def test_defaults_are_those_of_torch():
    [ours, _] = two_sets_of_parameters()
    group = AdamW([{"params": ours}]).param_groups[0]
    theirs = torch.optim.AdamW(ours).param_groups[0]
    assert {k: v for k, v in group.items() if k != "params"} == {
        name: pytest.approx(theirs[name]) for name in ("lr", "betas", "eps", "weight_decay")
    }


def test_a_trial_does_not_load_the_compiler():
    code = """
import sys, numpy as np
from cytoray.mil import LabelledBag, MILConfig, train_frozen
rng = np.random.default_rng(0)
bags = [LabelledBag(f"s{i}", rng.normal(size=(9, 8)).astype("float32"), i % 2) for i in range(8)]
train_frozen(MILConfig(aggregator="clam", epochs=1), bags[:4], bags[4:], 2)
print(sorted({"torch._dynamo", "sympy"} & {*sys.modules}))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
