"""What a registered model takes and gives: the `MLmodel` file that MLflow's registry shows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The signature of a model, and what loads it.

    Attributes:
        inputs: dtype and shape of each input by its name; -1 is any length.
        outputs: the same of what it gives.
        loader: module with `_load_pyfunc`, so that `mlflow.pyfunc.load_model` works; or empty.
    """

    inputs: Tensors
    outputs: Tensors
    loader: str = ""


def write_mlmodel(facts: ModelFacts, folder: Path, run_id: str, artifact_path: str) -> Path:
    """Write `MLmodel` into a folder; nothing is pickled."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(tensors: Tensors) -> Any:
        return Schema(
            [TensorSpec(np.dtype(kind), shape, name) for name, (kind, shape) in tensors.items()]
        )

    model = Model(
        artifact_path=artifact_path,
        run_id=run_id,
        signature=ModelSignature(inputs=schema(facts.inputs), outputs=schema(facts.outputs)),
    )
    if facts.loader:
        version = ".".join(map(str, sys.version_info[:3]))
        model.add_flavor("python_function", loader_module=facts.loader, python_version=version)
    path = folder / "MLmodel"
    model.save(str(path))
    return path
