"""`cytoray bags`: features of other tools in as bags, and bags out, in CLAM's HDF5 layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cytoray.errors import InputError
from cytoray.mil import TileFacts, export_hdf5, import_hdf5, open_bags
from cytoray.progress import summary_table
from cytoray.slides import read_slide_table


@dataclass(frozen=True, kw_only=True)
class Config:
    """Import feature files (`.h5`, `.hdf5`, `.pt`) as bags, or export bags as HDF5 files.

    Attributes:
        source: to import: a folder of feature files (CLAM's, with `h5_files` or `pt_files`, too),
            or one file; to export: a folder of bags (`.../bags`).
        out: folder of the bags or of the HDF5 files.
        to: `bags` imports, `hdf5` exports.
        index: to import: folder of `cytoray index`; slides that it does not know are refused.
        facts: how the tiles were made, where the files do not say it.
    """

    source: Path
    out: Path
    to: Literal["bags", "hdf5"] = "bags"
    index: Path | None = None
    facts: TileFacts = field(default_factory=TileFacts)

    def __post_init__(self) -> None:
        if self.to == "hdf5" and (self.index is not None or self.facts != TileFacts()):
            raise InputError("--index and --facts are for importing; leave them out to export bags")


def run(config: Config) -> dict[str, Any]:
    """Convert, and say what there is now."""
    if config.to == "hdf5":
        store = open_bags(config.source)
        summary: dict[str, Any] = {"files": len(export_hdf5(store, config.out))}
    else:
        known = None
        if config.index is not None:
            known = read_slide_table(config.index / "slides.parquet").column("slide_id").to_pylist()
        store = import_hdf5(config.source, config.out, config.facts, slide_ids=known)
        summary = {"bags": len(store)}
    infos = [store.info(name) for name in store.slide_ids]
    summary |= {
        "instances": sum(info.num_instances for info in infos),
        "width": infos[0].width,
        "encoder": infos[0].meta.encoder_name or infos[0].meta.encoder_id,
        "tiles": f"{infos[0].meta.tile_px} px at {infos[0].meta.mpp:g} um/px",
        "out": str(config.out),
    }
    summary_table("bags", summary)
    return summary


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("bags")
