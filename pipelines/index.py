"""`cytoray index`: manifest -> slide table, quarantine, foreground, nuclei, QC page."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute

from cytoray.config import to_plain
from cytoray.distributed.cluster import connect
from cytoray.distributed.index import index_slides, merge_parts
from cytoray.errors import InputError, raise_problems
from cytoray.indexing import IndexSettings
from cytoray.nuclei import DETECTORS
from cytoray.progress import Progress, summary_table
from cytoray.report import write_qc
from cytoray.runs import RunFolder
from cytoray.slides import Grid, read_manifest

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute


@dataclass(frozen=True, kw_only=True)
class Config:
    """Check every slide, find its cells and nuclei, and write the tables later jobs plan from.

    Attributes:
        manifest: CSV or Parquet with slide_id, path and, if you have them, patient_id, site, mpp,
            split and label columns.
        out: folder of the index.
        tile_px: tile side in pixels at `mpp`.
        mpp: um/px of the tiles.
        magnification: instead of mpp: 20 is 0.5 um/px, 40 is 0.25.
        detector: nuclei detector; `none` leaves detection to pretraining.
        keep_share: a tile is kept when at least this share of it is foreground.
        trust_manifest_mpp: let the manifest's mpp overrule a file that contradicts it.
        max_actors: reading actors at most; 0: one for each CPU.
        strict: exit with code 3 when a slide was quarantined.
        resume: go on with the index in `out`.
        address: a running Ray cluster, `auto` or HOST:PORT; default: start one here.
    """

    manifest: Path
    out: Path
    tile_px: int = 224
    mpp: float = 0.5
    magnification: float | None = None
    detector: str = "classical"
    keep_share: float = 0.02
    trust_manifest_mpp: bool = False
    max_actors: int = 0
    strict: bool = False
    resume: bool = False
    address: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.detector not in (*DETECTORS, "none"):
            problems.append(
                f"unknown detector {self.detector!r}; valid: {', '.join(sorted(DETECTORS))}, none"
            )
        if self.magnification is not None and self.magnification <= 0:
            problems.append(f"--magnification must be above 0, not {self.magnification:g}")
        if not 0 <= self.keep_share <= 1:
            problems.append(f"--keep-share must be from 0 to 1, not {self.keep_share:g}")
        if self.max_actors < 0:
            problems.append(f"--max-actors must be 0 or more, not {self.max_actors}")
        raise_problems("this index cannot be made:", problems)

    @property
    def grid(self) -> Grid:
        mpp = self.mpp if self.magnification is None else 10.0 / self.magnification
        return Grid(tile_px=self.tile_px, mpp=mpp)


def run(config: Config) -> dict[str, Any]:
    """Index the manifest's slides; a bad slide is quarantined and never stops the run."""
    began = time.perf_counter()
    settings = IndexSettings(
        grid=config.grid,
        detector=config.detector,
        keep_share=config.keep_share,
        trust_manifest_mpp=config.trust_manifest_mpp,
    )
    manifest = read_manifest(config.manifest)
    connect(config.address)
    folder = RunFolder.open(config.out, "index", to_plain(config), config.resume)
    with Progress(f"index of {len(manifest):,} slides") as progress:
        index_slides(
            manifest.rows, settings, folder.path, progress=progress, max_actors=config.max_actors
        )
    slides, quarantine = merge_parts(manifest, folder.path)
    page = write_qc(
        folder.path,
        (_qc_row(row) for batch in slides.to_batches(4096) for row in batch.to_pylist()),
        quarantine.to_pylist(),
        subtitle=str(config.manifest),
    )
    usable = pc.sum(pc.equal(slides["status"], "ok")).as_py() or 0
    summary = {
        "num_slides": usable,
        "num_quarantined": len(manifest) - usable,
        "num_quarantined_regions": pc.sum(pc.not_equal(quarantine["region"], "")).as_py() or 0,
        "num_tiles": pc.sum(slides["num_tiles"]).as_py() or 0,
        "num_nuclei": pc.sum(slides["num_nuclei"]).as_py() or 0,
        "slides": str(folder.path / "slides.parquet"),
        "quarantine": str(folder.path / "quarantine.parquet"),
        "qc_page": str(page),
        "seconds": round(time.perf_counter() - began, 1),
    }
    folder.write_summary(summary)
    summary_table("index", summary)
    if not usable:
        raise InputError(
            f"no slide of {config.manifest} can be used; the reasons are in {summary['quarantine']}"
            f" and on {page}"
        )
    exit_code: Literal[0, 3] = 3 if config.strict and summary["num_quarantined"] else 0
    return summary | {"exit_code": exit_code}


def _qc_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the slide table as the QC page takes it: no local paths, two kinds of status."""
    status = "ok" if row["status"] == "ok" else "quarantined"
    return {k: v for k, v in row.items() if k not in ("path", "keep_masks")} | {"status": status}


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("index")
