"""The chosen trials on the slides they were never shown: one a fold, and no other trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cytoray.distributed.search import predict_part
from cytoray.distributed.trials import SearchSettings, TrialSpec
from cytoray.evaluation.calibration import fit_temperature, scaled_probabilities
from cytoray.evaluation.held_out import assess
from cytoray.mil.cohort import Cohort, FeatureSet


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Held-out answers of each fold's best trial, pooled: every slide at most once.

    Attributes:
        trials: key of the trial that answered, by fold.
        indices: (M,) slides of the cohort.
        folds: (M,) name of the fold each slide was held out in.
        probabilities: (M, C) of each task.
        scaled: the same after temperature scaling.
        temperatures: of each task, by fold; fitted on the fold's validation slides.
        attention: (N_i,) of each slide.
        tile_ids: N_i of each slide, in the order of the attention.
    """

    trials: dict[str, str]
    indices: np.ndarray
    folds: np.ndarray
    probabilities: tuple[np.ndarray, ...]
    scaled: tuple[np.ndarray, ...]
    temperatures: dict[str, tuple[float, ...]]
    attention: list[np.ndarray]
    tile_ids: list[tuple[str, ...]]


def answer_held_out(
    best: Mapping[str, Mapping[str, Any]],
    specs: Sequence[TrialSpec],
    settings: SearchSettings,
    cohort: Cohort,
) -> Answers:
    """Predict each fold's held-out slides with the trial its validation slides chose.

    Args:
        best: the chosen result by fold.
        specs: all trials.
        settings: shared by the trials.
        cohort: the slides.
    """
    by_key = {spec.key: spec for spec in specs}
    indices, names, attention, tile_ids = [], [], [], []
    raw: list[list[np.ndarray]] = [[] for _ in cohort.tasks]
    scaled: list[list[np.ndarray]] = [[] for _ in cohort.tasks]
    temperatures: dict[str, tuple[float, ...]] = {}
    for fold, result in best.items():
        spec, parts = by_key[result["key"]], settings.folds[fold]
        head, adapted = Path(spec.folder) / "head", spec.config.lora_rank > 0
        both = np.concatenate([parts.val, parts.test])
        answers = predict_part(head, spec.encoder, settings, both, adapted=adapted)
        cut, fitted = len(parts.val), []
        for place, (logits, labels) in enumerate(
            zip(answers.logits, cohort.task_labels().values(), strict=True)
        ):
            known = labels[parts.val] >= 0
            temperature = fit_temperature(labels[parts.val][known], logits[:cut][known])
            raw[place].append(scaled_probabilities(logits[cut:], 1.0))
            scaled[place].append(scaled_probabilities(logits[cut:], temperature))
            fitted.append(temperature)
        temperatures[fold] = tuple(fitted)
        indices.append(parts.test)
        names += [fold] * len(parts.test)
        attention += answers.attention[cut:]
        features: FeatureSet = settings.features[spec.encoder].get()
        tile_ids += [features.tile_ids[i] for i in parts.test]
    return Answers(
        trials={fold: result["key"] for fold, result in best.items()},
        indices=np.concatenate(indices),
        folds=np.array(names),
        probabilities=tuple(np.concatenate(parts) for parts in raw),
        scaled=tuple(np.concatenate(parts) for parts in scaled),
        temperatures=temperatures,
        attention=attention,
        tile_ids=tile_ids,
    )


def assess_answers(
    answers: Answers, cohort: Cohort, *, calibrate: bool, seed: int
) -> dict[str, dict[str, Any]]:
    """What a paper reports of each task; see `assess`.

    Each task also holds `calibration`: ECE and Brier score before and after temperature scaling.

    Args:
        answers: pooled.
        cohort: the slides.
        calibrate: report the scaled probabilities.
        seed: of the bootstraps.
    """
    made = {}
    tables = zip(cohort.tasks, answers.probabilities, answers.scaled, strict=True)
    for task, raw, scaled in tables:
        labels = cohort.task_labels()[task][answers.indices]
        known = labels >= 0
        shared = labels[known], cohort.groups[answers.indices][known], answers.folds[known]
        kinds = {"before": raw[known], "after": scaled[known]}
        tested = {
            kind: assess(
                shared[0], table, shared[1], cohort.tasks[task], folds=shared[2], seed=seed
            )
            for kind, table in kinds.items()
        }
        made[task] = tested["after" if calibrate else "before"] | {
            "calibration": {
                kind: {name: entry["metrics"][name] for name in ("ece", "brier")}
                | {"reliability": entry["reliability"]}
                for kind, entry in tested.items()
            },
            "scaled": calibrate,
        }
    return made


def answer_rows(answers: Answers, cohort: Cohort, *, calibrate: bool) -> list[dict[str, Any]]:
    """One plain row a held-out slide: labels, probabilities, attention.

    `label` and `probabilities` are those of the first task; `tasks` holds all of them.

    Args:
        answers: pooled.
        cohort: the slides.
        calibrate: write the scaled probabilities.
    """
    tables = answers.scaled if calibrate else answers.probabilities
    labels, rows = cohort.task_labels(), []
    for place, i in enumerate(answers.indices.tolist()):
        tasks = {}
        for (task, names), table in zip(cohort.tasks.items(), tables, strict=True):
            label = int(labels[task][i])
            tasks[task] = {
                "label": names[label] if label >= 0 else None,
                "probabilities": dict(zip(names, table[place].tolist(), strict=True)),
            }
        first = next(iter(tasks.values()))
        rows.append(
            {
                "slide_id": cohort.slide_ids[i],
                "patient_id": cohort.leak_columns["patient"][i],
                "group": str(cohort.groups[i]),
                "fold": str(answers.folds[place]),
                "trial": answers.trials[str(answers.folds[place])],
                **first,
                "tasks": tasks,
                "attention": answers.attention[place].astype(float).round(6).tolist(),
                "tile_ids": list(answers.tile_ids[place]),
            }
        )
    return rows
