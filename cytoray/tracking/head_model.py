"""A MIL head as MLflow serves it: `mlflow.pyfunc.load_model("models:/cytoray-head/1")`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cytoray.mil import MILHead, load_head, predict
from cytoray.tracking.model_facts import ModelFacts


def head_facts(in_dim: int, tasks: Mapping[str, Sequence[str]]) -> ModelFacts:
    """The signature of a head: the features of a bag in, class probabilities of each task out.

    Args:
        in_dim: width D of the features.
        tasks: class names of each task.
    """
    return ModelFacts(
        inputs={"features": ("float32", (-1, in_dim))},
        outputs={task: ("float64", (-1, len(names))) for task, names in tasks.items()},
        loader=__name__,
    )


class HeadModel:
    """Answers for one bag at a time.

    Args:
        head: as a trial left it; with LoRA weights, features are those of its adapted encoder.
    """

    def __init__(self, head: MILHead) -> None:
        self.head = head

    def predict(self, model_input: Any, params: Any = None) -> dict[str, np.ndarray]:
        """Class probabilities (1, C) of each task, for `features` (N, D) of a bag."""
        features = model_input["features"] if isinstance(model_input, Mapping) else model_input
        answers = predict(self.head.aggregator, [np.asarray(features, np.float32)])
        return dict(zip(self.head.tasks, answers.task_probabilities, strict=True))


def _load_pyfunc(path: str) -> HeadModel:
    """Called by MLflow with the folder of the model."""
    return HeadModel(load_head(path))
