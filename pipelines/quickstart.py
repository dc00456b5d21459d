"""`cytoray quickstart`: the whole workflow on generated slides, ending with a report."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cytoray.config import to_plain
from cytoray.mil import MILConfig
from cytoray.progress import duration, summary_table
from cytoray.report import write_report
from cytoray.report.pretraining import pretrain_section
from cytoray.report.sections import index_section
from cytoray.runs import MAY_CHANGE, RunFolder, read_events
from cytoray.slides import read_quarantine
from cytoray.synthetic import SynthConfig
from pipelines import embed, index, pretrain, pretrain_report, synth, tune
from pipelines.runs import SMOKE


@dataclass(frozen=True, kw_only=True)
class Config:
    """Generate slides, index, pretrain, embed, tune, and write a report: everything once.

    Attributes:
        out: folder of everything made.
        slides: the slides to generate; `held_out` of them are kept for the final test.
        tile_px: tile side.
        mpp: um/px of the tiles.
        epochs: of pretraining.
        workers: training workers.
        aggregators: to tune over.
        lora_ranks: to tune over.
        mil: everything else of a trial.
        lora_epochs: epochs end to end of trials with a LoRA rank.
        seed: of the slides, of pretraining and of the split.
        resume: go on where an earlier quickstart in `out` was stopped.
        address: a running Ray cluster that sees `out`; default: start one here.
    """

    out: Path = Path("quickstart")
    slides: SynthConfig = field(
        default_factory=lambda: SynthConfig(num_slides=40, held_out=16, witness=0.2)
    )
    tile_px: int = 128
    mpp: float = 0.5
    epochs: float = 1.0
    workers: int = 1
    aggregators: tuple[str, ...] = ("mean", "abmil")
    lora_ranks: tuple[int, ...] = (0, 4)
    mil: MILConfig = field(
        default_factory=lambda: MILConfig(
            epochs=40, patience=15, lr=1e-3, tiles_per_bag=16, eval_tiles=64
        )
    )
    lora_epochs: int = 4
    seed: int = 0
    resume: bool = False
    address: str | None = None


def run(config: Config) -> dict[str, Any]:
    """Run the jobs one after another, each as its own command would."""
    began = time.perf_counter()
    out = config.out.resolve()
    folder = RunFolder.open(out, "quickstart", to_plain(config), config.resume, MAY_CHANGE)
    before = (folder.read_summary() or {}).get("seconds", 0.0) if folder.resumed else 0.0
    tracking_uri = f"sqlite:///{out}/mlflow.db"
    shared: dict[str, Any] = {"address": config.address, "resume": True}
    slides = replace(config.slides, seed=config.seed)
    manifest = Path(synth.run(synth.Config(out=out / "synth", slides=slides))["manifest"])
    indexed = index.run(
        index.Config(
            manifest=str(manifest),
            out=out / "index",
            tile_px=config.tile_px,
            mpp=config.mpp,
            **shared,
        )
    )
    pretraining = replace(
        SMOKE,
        index=out / "index",
        out=out / "pretrain",
        ssl=replace(SMOKE.ssl, seed=config.seed),
        epochs=config.epochs,
        splits=("train",),
        workers=config.workers,
        tracking_uri=tracking_uri,
        **shared,
    )
    pretrained = pretrain.run(pretraining)
    embedded = embed.run(
        embed.Config(
            index=out / "index", encoder=pretrained["encoder"], out=out / "embed", **shared
        )
    )
    tuned = tune.run(
        tune.Config(
            bags=(Path(embedded["bags"]),),
            index=out / "index",
            encoder=(pretrained["encoder"],),
            out=out / "tune",
            aggregators=config.aggregators,
            lora_ranks=config.lora_ranks,
            lrs=(config.mil.lr,),
            mil=config.mil,
            lora_epochs=config.lora_epochs,
            seed=config.seed,
            tracking_uri=tracking_uri,
            **shared,
        )
    )
    summary = {
        "auc_heldout": tuned["auc_heldout"],
        "auc_ci": tuned["auc_ci"],
        "best_trial": tuned["best"],
        "num_slides": indexed["num_slides"],
        "num_heldout": tuned["num_heldout"],
        "num_quarantined": indexed["num_quarantined"],
        "num_tiles": indexed["num_tiles"],
        "num_nuclei": indexed["num_nuclei"],
        "encoder": pretrained["encoder"],
        "head": tuned["head"],
        "mlflow_run_id": tuned["mlflow_run_id"],
        "mlflow_ui": tuned["mlflow_ui"],
        "qc_page": indexed["qc_page"],
        "report": str(folder.report_path),
        "seconds": round(before + time.perf_counter() - began, 1),
    }
    _write_report(folder, pretraining, indexed, pretrained, tuned, summary)
    folder.write_summary(summary)
    summary_table("quickstart", summary | {"seconds": duration(summary["seconds"])})
    print(
        f"\nlook:   {folder.report_path}\n"
        f"trials: {tuned['mlflow_ui']}\n"
        "next:   write a manifest of your own slides (slide_id, path, patient_id, label) and run\n"
        "        cytoray index --manifest slides.csv --out index"
    )
    return summary


def _write_report(
    folder: RunFolder,
    pretraining: pretrain.Config,
    indexed: dict[str, Any],
    pretrained: dict[str, Any],
    tuned: dict[str, Any],
    summary: dict[str, Any],
) -> None:
    plan = pretrain.read_plan(pretraining)
    encoder = Path(pretrained["encoder"])
    pictures = pretrain_report.pictures(pretraining, plan, encoder)
    events = list(read_events(pretraining.out / "events.jsonl"))
    quarantine = read_quarantine(indexed["quarantine"]).num_rows
    overview = {
        "title": "Overview",
        "facts": {
            "held-out AUC": summary["auc_heldout"],
            "95 % CI (patients resampled)": "{:.3f} to {:.3f}".format(*summary["auc_ci"]),
            "slides": summary["num_slides"],
            "held out": summary["num_heldout"],
            "quarantine rows": quarantine,
            "best trial": summary["best_trial"],
            "time": duration(summary["seconds"]),
        },
        "text": "Generated slides, for trying the workflow: the figures say nothing about "
        "diagnosis. For research use only.",
        "code": summary["mlflow_ui"],
    }
    sections = [
        overview,
        index_section(plan, pretraining.index, indexed),
        pretrain_section(events, pretrained, pictures),
        *tune.report_sections(Path(tuned["report"]).parent, embed.index_plan(pretraining.index)),
    ]
    write_report(folder.report_path, sections, "cytoray quickstart", str(folder.path))


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("quickstart")
