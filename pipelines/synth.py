"""`cytoray synth`: cytology-like slides with truth, to try everything on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cytoray.progress import Progress, summary_table
from cytoray.synthetic import SynthConfig, synthesize


@dataclass(frozen=True, kw_only=True)
class Config:
    """Make pyramidal slides that OpenSlide opens, a manifest, and the truth beside them.

    Attributes:
        out: folder to write to.
        slides: what to make.
        workers: processes.
        address: taken for uniformity; this job does not use a cluster.
    """

    out: Path
    slides: SynthConfig = field(default_factory=SynthConfig)
    workers: int = 2
    address: str | None = None


def run(config: Config) -> dict[str, Any]:
    """Make the slides; finished ones of an earlier call are kept."""
    with Progress("synth") as progress:
        manifest = synthesize(
            config.slides,
            config.out,
            workers=config.workers,
            progress=lambda done, total: progress.update("slides", done, total, "slides"),
        )
    summary = {
        "manifest": str(manifest),
        "slides": config.slides.num_slides,
        "held out": config.slides.held_out,
        "next": f"cytoray index --manifest {manifest} --out {config.out}/index",
    }
    summary_table("generated slides", summary)
    return summary


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("synth")
