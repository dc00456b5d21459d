"""`cytoray index`: manifest -> slide table, quarantine, foreground, nuclei, QC page."""

from __future__ import annotations

import secrets
import shutil
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
from cytoray.patience import PARTIAL, Patience
from cytoray.progress import Progress, summary_table
from cytoray.report import write_qc
from cytoray.runs import RunFolder
from cytoray.slides import Grid, magnification_to_mpp, read_manifest
from cytoray.slides.remote import check_urls, redact

_MPP = 0.5

# Arrow makes its compute functions at import, where a type checker cannot see them.
pc: Any = pyarrow.compute


@dataclass(frozen=True, kw_only=True)
class Config:
    """Check every slide, find its cells and nuclei, and write the tables later jobs plan from.

    Attributes:
        manifest: CSV or Parquet, a path or a URL, with slide_id, path and, if you have them,
            patient_id, site, mpp, split and label columns.
        out: folder of the index.
        tile_px: tile side in pixels at `mpp`.
        mpp: um/px of the tiles; default: 0.5.
        magnification: instead of mpp: 20 is 0.5 um/px, 40 is 0.25.
        detector: nuclei detector; `none` leaves detection to pretraining.
        nuclei_dir: with the detector `precomputed`: folder of <slide_id>.csv, .geojson or .parquet.
        nuclei_frame: what x and y of those files are, unless they say: `level0` pixels or `um`.
        keep_share: a tile is kept when at least this share of it is foreground.
        trust_manifest_mpp: let the manifest's mpp overrule a file that contradicts it.
        estimate_mpp: check every slide's um/px by the size of its nuclei, and take that where
            nobody states one; rough: it finds errors by ten.
        min_focus: tiles less sharp than this (0..1; 0.36 is a blur of about 2.5 um) are left out.
        min_nuclei: tiles with fewer nuclei are left out; 1 leaves out cytoplasm and debris alone.
        timeout_s: seconds that opening a slide, or reading one of its chunks, may take before its
            reader is ended and started again; 0: any time.
        max_tries: a slide whose reader died or was ended this often at one place is quarantined.
        max_actors: reading actors at most; 0: one for each CPU.
        strict: exit with code 3 when a slide was quarantined.
        resume: go on with the index in `out`.
        address: a running Ray cluster, `auto` or HOST:PORT; default: start one here.
    """

    manifest: str
    out: Path
    tile_px: int = 224
    mpp: float | None = None
    magnification: float | None = None
    detector: str = "classical"
    nuclei_dir: Path | None = None
    nuclei_frame: str = "level0"
    keep_share: float = 0.02
    trust_manifest_mpp: bool = False
    estimate_mpp: bool = False
    min_focus: float = 0.0
    min_nuclei: int = 0
    timeout_s: float = 600.0
    max_tries: int = 2
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
        elif self.magnification is not None and self.mpp is not None:
            meant = magnification_to_mpp(self.magnification)
            if abs(self.mpp / meant - 1) > 1e-6:
                problems.append(
                    f"--magnification {self.magnification:g} is {meant:g} um/px, --mpp says "
                    f"{self.mpp:g}; give one of them"
                )
        if (self.detector == "precomputed") != (self.nuclei_dir is not None):
            problems.append(
                "--nuclei-dir and --detector precomputed belong together: give both or neither"
            )
        if self.nuclei_frame not in ("level0", "um"):
            problems.append(f"--nuclei-frame must be level0 or um, not {self.nuclei_frame!r}")
        if not 0 <= self.min_focus < 1:
            problems.append(f"--min-focus must be from 0 to below 1, not {self.min_focus:g}")
        if self.min_nuclei < 0:
            problems.append(f"--min-nuclei must be 0 or more, not {self.min_nuclei}")
        if self.min_nuclei and self.detector == "none":
            problems.append("--min-nuclei needs nuclei: choose a --detector other than none")
        if not 0 <= self.keep_share <= 1:
            problems.append(f"--keep-share must be from 0 to 1, not {self.keep_share:g}")
        if self.timeout_s < 0:
            problems.append(f"--timeout-s must be 0 or more, not {self.timeout_s:g}")
        if self.max_tries < 1:
            problems.append(f"--max-tries must be 1 or more, not {self.max_tries}")
        if self.max_actors < 0:
            problems.append(f"--max-actors must be 0 or more, not {self.max_actors}")
        raise_problems("this index cannot be made:", problems)

    @property
    def detector_options(self) -> dict[str, Any]:
        """What the detector is built with."""
        if self.nuclei_dir is None:
            return {}
        return {"folder": str(self.nuclei_dir.resolve()), "frame": self.nuclei_frame}

    @property
    def grid(self) -> Grid:
        if self.magnification is not None:
            return Grid(tile_px=self.tile_px, mpp=magnification_to_mpp(self.magnification))
        return Grid(tile_px=self.tile_px, mpp=_MPP if self.mpp is None else self.mpp)


def run(config: Config) -> dict[str, Any]:
    """Index the manifest's slides; a bad slide is quarantined and never stops the run."""
    began = time.perf_counter()
    settings = IndexSettings(
        grid=config.grid,
        detector=config.detector,
        detector_kwargs=config.detector_options,
        estimate_mpp=config.estimate_mpp,
        min_focus=config.min_focus,
        min_nuclei=config.min_nuclei,
        keep_share=config.keep_share,
        trust_manifest_mpp=config.trust_manifest_mpp,
        patience=Patience(
            timeout_s=config.timeout_s,
            max_tries=config.max_tries,
            run_token=secrets.token_hex(8),
        ),
    )
    manifest = read_manifest(config.manifest)
    check_urls(row["path"] for row in manifest.iter_rows())
    connect(config.address)
    folder = RunFolder.open(config.out, "index", to_plain(config), config.resume)
    with Progress(f"index of {len(manifest):,} slides") as progress:
        index_slides(
            manifest.rows, settings, folder.path, progress=progress, max_actors=config.max_actors
        )
    slides, quarantine = merge_parts(manifest, folder.path)
    shutil.rmtree(folder.path / PARTIAL, ignore_errors=True)
    page = write_qc(
        folder.path,
        (row for batch in slides.to_batches(4096) for row in batch.to_pylist()),
        quarantine.to_pylist(),
        subtitle=redact(str(config.manifest)),
        labels=manifest.label_columns,
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
            f"no slide of {redact(str(config.manifest))} can be used; the reasons are in "
            f"{summary['quarantine']} and on {page}"
        )
    exit_code: Literal[0, 3] = 3 if config.strict and summary["num_quarantined"] else 0
    return summary | {"exit_code": exit_code}


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("index")
