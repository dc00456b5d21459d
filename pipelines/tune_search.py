"""What `cytoray tune` is about to search, checked before anything is started or written."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cytoray.config import to_plain
from cytoray.distributed.cluster import Shared
from cytoray.distributed.trials import SearchSettings, TrialSpec
from cytoray.errors import InputError, choose, raise_problems
from cytoray.io import atomic_write_text
from cytoray.mil import AGGREGATORS, MILConfig, open_bags
from cytoray.mil.cohort import (
    Cohort,
    FeatureSet,
    check_task_support,
    cohort_facts,
    distinct_names,
    read_cohort,
    read_features,
)
from cytoray.mil.folds import Fold, final_fold, fold_problems, make_folds
from cytoray.mil.space import Axis, Candidate, candidates_of, configs_of, draws, grid, read_axes
from cytoray.models.encoder import load_encoder
from cytoray.models.lora import check_lora
from cytoray.progress import summary_table
from cytoray.runs import RunFolder
from cytoray.slides import read_slide_table
from cytoray.tracking import ChildRun
from pipelines.embed import index_plan

if TYPE_CHECKING:
    from pipelines.tune import Config


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search ready to run: what is tried on what.

    Attributes:
        candidates: what is tried.
        cohort: the slides.
        features: their bags, one set an encoder.
        folds: the folds.
        encoders: one a feature set, or empty.
        uses_lora: some trial adapts an encoder.
    """

    candidates: list[Candidate]
    cohort: Cohort
    features: list[FeatureSet]
    folds: list[Fold]
    encoders: tuple[str, ...]
    uses_lora: bool


def prepare(config: Config) -> Search:
    """Everything that can be checked before anything is started or written.

    Raises:
        InputError: trials that cannot be, bags or labels that do not fit, a split that leaks.
    """
    for name in config.aggregators:
        choose("aggregator", name, AGGREGATORS)
    configs = search_configs(config)
    names = {mil.aggregator for mil in configs}
    uses_lora = any(mil.lora_rank > 0 for mil in configs)
    if uses_lora and not config.encoder:
        raise InputError("--encoder must name the encoders that trials with a LoRA rank adapt")
    check_task_support(
        {name: AGGREGATORS[name].multi_task for name in sorted(names)},
        dict.fromkeys(config.label, ()),
    )
    stores = [open_bags(folder, check=False) for folder in config.bags]
    cohort = read_cohort(config.index / "slides.parquet", config.label, stores, config.group)
    shares = {"val_fraction": config.val_fraction, "seed": config.seed}
    folds = make_folds(
        cohort.labels,
        cohort.groups,
        folds=config.folds,
        test_fraction=config.test_fraction,
        split=cohort.split,
        leak_columns=cohort.leak_columns,
        **shares,
    )
    every = folds
    if config.folds:
        unit = "group" if config.group else "patient"
        every = [*folds, final_fold(cohort.labels, cohort.groups, unit=unit, **shares)]
    raise_problems(
        "these slides cannot be searched on:",
        [problem for fold in every for problem in fold_problems(fold, cohort.labels, cohort.tasks)],
    )
    two_scales = any(AGGREGATORS[name].num_scales == 2 for name in names)
    if config.coarse_bags and not two_scales:
        raise InputError("--coarse-bags are for aggregators of two scales: add less to the search")
    coarse = [open_bags(folder, check=False) for folder in config.coarse_bags]
    features = [
        read_features(store, cohort.slide_ids, coarse=second if two_scales else False)
        for store, second in zip(stores, coarse or [True] * len(stores), strict=True)
    ]
    shown = distinct_names([entry.name for entry in features])
    features = [replace(entry, name=name) for entry, name in zip(features, shown, strict=True)]
    encoders = tuple(str(Path(e).resolve()) if Path(e).is_dir() else e for e in config.encoder)
    _check_encoders(encoders, config.pretrained, features, configs)
    return Search(
        candidates=candidates_of(configs, [entry.encoder_id for entry in features]),
        cohort=cohort,
        features=features,
        folds=every,
        encoders=encoders or ("",) * len(features),
        uses_lora=uses_lora,
    )


def search_configs(config: Config) -> list[MILConfig]:
    """The trials, each once.

    Raises:
        InputError: values no trial can have.
    """
    axes: dict[str, Axis] = {"aggregator": config.aggregators, "lora_rank": config.lora_ranks}
    axes |= {"lora_blocks": config.lora_blocks} if config.lora_blocks != (0,) else {}
    axes |= {"lr": config.lrs} if config.lrs else {}
    axes |= {"weight_decay": config.weight_decays} if config.weight_decays else {}
    axes |= read_axes(config.space) if config.space else {}
    many = config.search == "random"
    points = draws(axes, config.num_samples, config.seed) if many else grid(axes)
    return configs_of(
        points, config.mil, published=config.published, lora_epochs=config.lora_epochs
    )


def _check_encoders(
    encoders: tuple[str, ...],
    pretrained: bool,
    features: list[FeatureSet],
    configs: list[MILConfig],
) -> None:
    adaptations = {(c.lora_targets, c.lora_blocks) for c in configs if c.lora_rank}
    problems = []
    for source, made in zip(encoders, features if encoders else [], strict=True):
        encoder = load_encoder(source, pretrained=pretrained)
        encoder_id = encoder.encoder_id
        for targets, blocks in sorted(adaptations):
            try:
                check_lora(encoder.model, targets, blocks)
            except InputError as error:
                problems.append(f"--encoder {source}: {error}")
        if encoder_id != made.encoder_id:
            problems.append(
                f"the bags were made by encoder {made.encoder_id}, --encoder {source} is "
                f"{encoder_id}; embed again, or name the encoder that made them"
            )
    raise_problems("these encoders cannot be used:", problems)


def plan_search(config: Config, search: Search) -> dict[str, Any]:
    """Show what a run would do: facts by name."""
    folds = [fold for fold in search.folds if fold.name != "final"]
    ranks = sorted({candidate.config.lora_rank for candidate in search.candidates})
    plan = {
        "trials": len(search.candidates) * len(folds),
        "candidates": len(search.candidates),
        "aggregators": ", ".join(sorted({c.config.aggregator for c in search.candidates})),
        "LoRA ranks": ", ".join(map(str, ranks)),
        "encoders": ", ".join(entry.name for entry in search.features),
        "epochs at most": sum(c.config.epochs for c in search.candidates) * len(folds),
        **cohort_facts(search.cohort, folds),
    }
    summary_table("tune would run", plan)
    print(f"nothing was started or written; leave out --dry-run to search into {config.out}")
    return plan


def keep_space(folder: RunFolder, candidates: list[Candidate]) -> None:
    """Keep what is tried; a resumed run must try the same (the file of the space may change).

    Raises:
        InputError: it does not.
    """
    path, keys = folder.path / "candidates.json", [c.key for c in candidates]
    if not path.exists():
        atomic_write_text(path, json.dumps(keys, indent=1) + "\n")
        return
    if json.loads(path.read_text(encoding="utf-8")) != keys:
        raise InputError(
            f"{folder.path} was started with another search space or other bags; undo the change "
            "to resume it, or choose another --out"
        )


def trial_specs(search: Search, folder: RunFolder) -> list[TrialSpec]:
    """Every candidate on every fold, with names and folders that are the same on resume."""
    return [
        spec_of(candidate, fold, folder)
        for fold in search.folds
        if fold.name != "final"
        for candidate in search.candidates
    ]


def spec_of(candidate: Candidate, fold: Fold, folder: RunFolder) -> TrialSpec:
    key = "-".join(filter(None, (candidate.key, fold.name)))
    return TrialSpec(
        key=key,
        candidate=candidate.key,
        config=candidate.config,
        encoder=candidate.encoder,
        fold=fold.name,
        folder=str(folder.path / "trials" / key),
    )


def search_settings(config: Config, search: Search) -> SearchSettings:
    """What all trials share, in the object store."""
    return SearchSettings(
        cohort=Shared(search.cohort),
        folds={fold.name: fold for fold in search.folds},
        features=tuple(Shared(entry) for entry in search.features),
        encoders=search.encoders,
        pretrained=config.pretrained,
        plan=Shared(index_plan(config.index)) if search.uses_lora else None,
        cpus_per_trial=config.cpus_per_trial,
        gpus_per_trial=config.gpus_per_trial,
        extra={"label": " ".join(config.label), "bags": [str(bags) for bags in config.bags]},
    )


def child_runs(search: Search, folder: RunFolder) -> list[ChildRun]:
    """The MLflow runs there may be: one a trial, made when it begins."""
    made = []
    for fold in search.folds:
        for candidate in search.candidates:
            spec = spec_of(candidate, fold, folder)
            facts = {"encoder": search.features[spec.encoder].name, "fold": spec.fold or "all"}
            made.append(
                ChildRun(
                    key=f"{folder.run_id}:{spec.key}",
                    name=spec.key,
                    folder=Path(spec.folder),
                    params=to_plain(spec.config) | facts,
                    tags={"cytoray.job": "trial", "cytoray.candidate": spec.candidate},
                )
            )
    return made


def hide_paths(failed: dict[str, str], index: Path) -> dict[str, str]:
    """Messages of failed trials without the paths of slides: they go to MLflow and the report."""
    if not failed:
        return {}
    for path in read_slide_table(index / "slides.parquet").column("path").to_pylist():
        failed = {key: text.replace(path, "a slide's file") for key, text in failed.items()}
    return failed
