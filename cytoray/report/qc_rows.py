"""One slide as the quality page shows it: numbers to sort by, words to read, what is wrong."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cytoray.plain import json_ready
from cytoray.report.page import text_of

# kind: how the page calls it
IMAGE_KINDS = {
    "thumbnail": "slide",
    "foreground": "foreground",
    "density": "nuclei",
    "focus": "focus",
}
METRICS = (
    "tiles", "nuclei", "nuclei_per_tile", "mpp", "foreground", "focus", "blurred", "regions",
    "warnings", "trouble",
)  # fmt: skip

# A slide beyond one of these is usable, and yet worth a look.
MAX_BLURRED = 0.2
MIN_TILES = 20
MIN_NUCLEI_PER_TILE = 0.5

_MAX_REGIONS = 20
_QUARANTINED_TROUBLE = 10.0
_PATH = re.compile(
    r"""[a-zA-Z][a-zA-Z0-9+.\-]*://[^\s'"]+"""  # a URL
    r"""|(?<![\w./\\])(?:[A-Za-z]:)?[/\\]{1,2}(?:[^\s/\\:;,'"()]+[/\\])+[^\s/\\:;,'"()]*"""
)


def without_paths(text: str, *paths: str) -> str:
    """`text` with every path in it replaced by `[path]`: folders and files can name patients.

    Args:
        text: a message of a library or of this package.
        paths: paths known to be in it, which may hold spaces.
    """
    for path in sorted((p for p in paths if p), key=len, reverse=True):
        text = text.replace(path, "[path]")
    return _PATH.sub("[path]", text)


@dataclass
class Problems:
    """The quarantine by slide: whole slides with their reasons, and regions."""

    slides: dict[str, list[list[str]]] = field(default_factory=dict)
    regions: dict[str, list[list[str]]] = field(default_factory=dict)
    num_regions: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, quarantine: Iterable[Mapping[str, Any]]) -> Problems:
        """Collect `[code, message, stage]` of slides and `[region, code, message]` of regions.

        Of a slide with many regions the first 20 are kept, and the number of all.
        """
        problems = cls()
        for entry in quarantine:
            slide_id, code = str(entry["slide_id"]), str(entry.get("reason_code") or "")
            message = without_paths(
                str(entry.get("message") or ""), str(entry.get("path") or ""), slide_path(entry)
            )
            if not entry.get("region"):
                stage = str(entry.get("stage") or "")
                problems.slides.setdefault(slide_id, []).append([code, message, stage])
                continue
            problems.num_regions[slide_id] += 1
            kept = problems.regions.setdefault(slide_id, [])
            if len(kept) < _MAX_REGIONS:
                kept.append([str(entry["region"]), code, message])
        return problems


def slide_path(row: Mapping[str, Any]) -> str:
    """The folder of a row's path, since messages may name other files of it; may be empty."""
    folder = os.path.dirname(str(row.get("path") or ""))
    return folder if len(folder) > 1 else ""


@dataclass(frozen=True, kw_only=True)
class QcRow:
    """A slide on the page.

    Attributes:
        slide_id: its name.
        categories: texts the page filters by; `reason` is empty for a usable slide.
        metrics: numbers the page sorts by, None where unknown, under the names of `METRICS`.
        words: what else is shown: `problems`, `warnings`, `facts`, `regions`, `images`.
    """

    slide_id: str
    categories: dict[str, str]
    metrics: dict[str, float | None]
    words: dict[str, Any]

    @property
    def usable(self) -> bool:
        return not self.categories["reason"]

    def index_entry(self) -> dict[str, Any]:
        """The short entry: id, metrics with four digits, categories."""
        return (
            {"id": self.slide_id}
            | {name: _short(value) for name, value in self.metrics.items()}
            | self.categories
        )


def describe(row: Mapping[str, Any], problems: Problems, out: Path, labels: Sequence[str]) -> QcRow:
    """Make a slide's row; see `cytoray.report.qc.write_qc` for what `row` may hold."""
    row = json_ready(row)
    slide_id = str(row["slide_id"])
    found = problems.slides.get(slide_id, [])
    metrics = _metrics(row, problems.num_regions[slide_id])
    reason = _reason(row, found)
    warnings = [] if reason else warnings_of(metrics, row.get("mpp_source"))
    metrics["warnings"] = len(warnings)
    metrics["trouble"] = _QUARANTINED_TROUBLE if reason else trouble(metrics, len(warnings))
    names = ("mpp_source", "reader", "site", "split", *labels)
    categories = {name: "" if row.get(name) is None else str(row[name]) for name in names}
    return QcRow(
        slide_id=slide_id,
        categories={"reason": reason} | categories,
        metrics=metrics,
        words={
            "problems": found,
            "warnings": warnings,
            "facts": _facts(row, labels),
            "regions": problems.regions.get(slide_id, []),
            "images": {k: url for k in IMAGE_KINDS if (url := _image_url(row, slide_id, k, out))},
        },
    )


def _reason(row: Mapping[str, Any], found: Sequence[Sequence[str]]) -> str:
    status = str(row.get("status") or "ok")
    if status == "ok":
        return ""
    if status == "quarantined":
        return next((code for code, _, _ in found if code), status)
    return status


def _metrics(row: Mapping[str, Any], num_regions: int) -> dict[str, float | None]:
    tiles, nuclei = row.get("num_tiles"), row.get("num_nuclei")
    return {
        "tiles": tiles,
        "nuclei": nuclei,
        "nuclei_per_tile": nuclei / tiles if tiles and nuclei is not None else None,
        "mpp": row.get("mpp_x") or row.get("mpp"),
        "foreground": row.get("foreground_share"),
        "focus": row.get("focus_median"),
        "blurred": row.get("out_of_focus_share"),
        "regions": num_regions,
    }


def warnings_of(metrics: Mapping[str, float | None], mpp_source: str | None) -> list[str]:
    """What is worth a look on a usable slide, a few words each."""
    found = []
    tiles, dense = metrics["tiles"], metrics["nuclei_per_tile"]
    blurred, regions = metrics["blurred"], metrics["regions"]
    if blurred is not None and blurred >= MAX_BLURRED:
        found.append(f"{blurred:.0%} of tiles out of focus")
    if regions:
        found.append(f"{regions:,} region{'s' if regions > 1 else ''} left out")
    if tiles is not None and tiles < MIN_TILES:
        found.append(f"only {tiles} tile{'s' if tiles != 1 else ''}")
    if dense is not None and dense < MIN_NUCLEI_PER_TILE:
        found.append(f"few nuclei, {dense:.2g} a tile")
    if mpp_source == "estimated":
        found.append("um per px is estimated")
    return found


def trouble(metrics: Mapping[str, float | None], num_warnings: int) -> float:
    """How much of a usable slide is lost: share of tiles left out or blurred, 1/4 a warning."""
    tiles, regions = metrics["tiles"] or 0, metrics["regions"] or 0
    lost = regions / (tiles + regions) if regions else 0.0
    return lost + (metrics["blurred"] or 0.0) + 0.25 * num_warnings


def _facts(row: Mapping[str, Any], labels: Sequence[str]) -> list[list[str]]:
    """Name and value of what is no column of the table."""
    width, height = row.get("width_px_level0"), row.get("height_px_level0")
    power = row.get("objective_power")
    reader, why = row.get("reader"), row.get("reader_reason")
    facts = [
        ("size", f"{width:,} x {height:,} px" if width and height else None),
        ("scanner file", row.get("vendor")),
        ("objective", f"{power:g}x" if power else None),
        ("reader", f"{reader}: {without_paths(why)}" if reader and why else reader),
        ("site", row.get("site")),
        ("split", row.get("split")),
        *((label, row.get(label)) for label in labels),
    ]
    return [[name, text_of(value)] for name, value in facts if value not in (None, "")]


def _image_url(row: Mapping[str, Any], slide_id: str, kind: str, out: Path) -> str:
    """URL of a picture relative to the page; empty when there is none."""
    given = row.get(f"{kind}_path")
    path = Path(given) if given else Path("qc") / f"{slide_id}.{kind}.jpg"
    if not given and not (out / path).exists():
        return ""
    if path.is_absolute():
        path = Path(os.path.relpath(path, out.resolve()))
    return quote(path.as_posix())


def _short(value: float | None) -> float | None:
    return float(f"{value:.4g}") if isinstance(value, float) else value
