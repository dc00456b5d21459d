"""`cytoray embed`: an encoder turns every slide of an index into a bag of features."""

from __future__ import annotations

import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cytoray.config import to_plain
from cytoray.distributed.cluster import Need, check_fits, connect
from cytoray.distributed.embed import EncoderChoice, embed_slides
from cytoray.errors import InputError
from cytoray.patience import PARTIAL, Patience, ReadTries
from cytoray.progress import Progress, summary_table
from cytoray.runs import MAY_CHANGE, RunFolder
from cytoray.slides import merge_quarantine
from cytoray.streaming.plan import ReadPlan, plan_of_index


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write a bag (features and coordinates of every kept tile) for each slide of an index.

    Attributes:
        index: folder written by `cytoray index`.
        encoder: folder written by `cytoray pretrain`, or a timm model name.
        out: folder of this run; the bags are in its `bags/`.
        pretrained: for a timm name: its published weights (needs a connection), else random ones.
        encoders: encoder actors, one GPU each where there are GPUs.
        use_gpu: embed on GPUs; default: when the cluster has them.
        timeout_s: seconds that opening a slide, or reading one of its chunks, may take before its
            reader is ended; 0: any time.
        max_tries: a slide whose reader died or was ended this often at one place is quarantined.
        strict: exit with code 3 when a tile or slide could not be read.
        resume: go on with the bags in `out`.
        address: a running Ray cluster; default: start one here.
    """

    index: Path
    encoder: str
    out: Path
    pretrained: bool = True
    encoders: int = 1
    use_gpu: bool | None = None
    timeout_s: float = 600.0
    max_tries: int = 2
    strict: bool = False
    resume: bool = False
    address: str | None = None

    def __post_init__(self) -> None:
        if self.encoders < 1:
            raise InputError(f"--encoders must be 1 or more, not {self.encoders}")
        Patience(timeout_s=self.timeout_s, max_tries=self.max_tries)


def run(config: Config) -> dict[str, Any]:
    """Embed the slides that have no bag yet."""
    began = time.perf_counter()
    plan = index_plan(config.index)
    choice = EncoderChoice(source=config.encoder, pretrained=config.pretrained)
    encoder = choice.load()
    connect(config.address)
    resources = ray.cluster_resources()
    use_gpu = resources.get("GPU", 0) > 0 if config.use_gpu is None else config.use_gpu
    check_fits(
        [
            Need(what="encoder", count=config.encoders, cpus=0.5, gpus=1.0 if use_gpu else 0.0),
            Need(what="tile reader", count=1, cpus=0.4),
            Need(what="list of chunks", count=1, cpus=0.1),
        ],
        hint="ask for fewer --encoders or add nodes",
    )
    may_change = MAY_CHANGE | {"encoders", "use_gpu", "timeout_s", "max_tries"}
    folder = RunFolder.open(config.out, "embed", to_plain(config), config.resume, may_change)
    bags = folder.path / "bags"
    partial = folder.path / PARTIAL
    patience = Patience(
        timeout_s=config.timeout_s, max_tries=config.max_tries, run_token=secrets.token_hex(8)
    )
    with Progress(f"embed {plan.slides.num_rows:,} slides") as progress:
        done = embed_slides(
            plan,
            choice,
            bags,
            progress=progress,
            use_gpu=use_gpu,
            num_encoders=config.encoders,
            tries=ReadTries(folder=str(partial), patience=patience),
        )
    shutil.rmtree(partial, ignore_errors=True)
    table = merge_quarantine(
        done.quarantine, folder.path / "quarantine.parquet", redone=done.tried, stage="embed"
    )
    summary = {
        "num_slides": plan.slides.num_rows,
        "num_written": done.num_written,
        "num_quarantined": table.num_rows,
        "num_tiles": plan.num_tiles,
        "encoder_id": encoder.encoder_id,
        "feature_width": encoder.embed_dim,
        "bags": str(bags),
        "seconds": round(time.perf_counter() - began, 1),
        "next": f"cytoray tune --bags {bags} --index {config.index} --encoder {config.encoder} "
        "--out TUNE",
    }
    folder.write_summary(summary)
    summary_table("embed", summary)
    return summary | {"exit_code": 3 if config.strict and table.num_rows else 0}


def index_plan(index: Path) -> ReadPlan:
    """Everything an index has to read.

    Raises:
        InputError: no index there, or no usable tile.
    """
    return plan_of_index(index)


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("embed")
