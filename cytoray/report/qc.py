"""The quality page of an index run: every slide with its pictures, quarantined ones first.

A million slides must not become one file or one list: pictures are files beside the page, rows come
in files of 500 that the page loads as they are needed (as scripts, since a page opened from disk
may load those and nothing else), and the writer holds one such file at a time.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cytoray.io import atomic_write_text
from cytoray.plain import json_ready
from cytoray.report.page import facts_of, render, table_of, text_of

IMAGE_KINDS = ("thumbnail", "foreground", "density")
_ROWS_PER_FILE = 500
_MAX_LISTED = 200


def write_qc(
    out_dir: str | Path,
    rows: Iterable[Mapping[str, Any]],
    quarantine: Sequence[Mapping[str, Any]] = (),
    title: str = "Slide quality",
    subtitle: str = "",
) -> Path:
    """Write `qc.html` and its row files `qc/rows-*.js`.

    Args:
        out_dir: the run folder; pictures lie in its `qc/`.
        rows: one dict a slide, e.g. rows of the slide table (an iterator is read once): `slide_id`,
            `status` (`ok` or `quarantined`) and, where known, `reason`, `path`, `site`,
            `width_px_level0`, `height_px_level0`, `mpp` or `mpp_x`, `mpp_source`, `vendor`,
            `reader`, `foreground_share`, `num_tiles`, `num_nuclei`, and `thumbnail_path`,
            `foreground_path`, `density_path` (absolute, or relative to `out_dir`; by default
            `qc/<slide_id>.<kind>.jpg` where that exists). Other fields are left out.
        quarantine: dicts of `slide_id`, `reason_code`, `message`, `region` (empty for a whole
            slide), `stage`.
        title: of the page.
        subtitle: a line below it.

    Returns:
        The path of `qc.html`.
    """
    out = Path(out_dir)
    folder = out / "qc"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("rows-*.js"):
        stale.unlink()
    problems = _Problems.of(quarantine)
    refused, usable = _RowFiles(folder, "q"), _RowFiles(folder, "s")
    totals = _Totals()
    for row in rows:
        shown = _row(row, out, problems)
        totals.add(shown)
        (refused if shown["status"] != "ok" else usable).add(shown)
    files = [*refused.close(), *usable.close()]
    html = render(
        "qc.html",
        title=title,
        subtitle=subtitle,
        facts=facts_of(totals.facts(problems)),
        tables=[table_of(table) for table in problems.tables()],
        meta={"files": files, "kinds": IMAGE_KINDS},
    )
    atomic_write_text(out / "qc.html", html)
    return out / "qc.html"


@dataclass
class _Problems:
    """The quarantine ledger by slide: reasons of whole slides, number of bad regions."""

    slides: dict[str, list[str]] = field(default_factory=dict)
    regions: Counter[str] = field(default_factory=Counter)
    slide_rows: list[list[str]] = field(default_factory=list)
    region_codes: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, quarantine: Iterable[Mapping[str, Any]]) -> _Problems:
        problems = cls()
        for entry in quarantine:
            slide_id, code = str(entry["slide_id"]), str(entry.get("reason_code", ""))
            if entry.get("region"):
                problems.regions[slide_id] += 1
                problems.region_codes.setdefault(slide_id, Counter())[code] += 1
            else:
                message = str(entry.get("message", ""))
                problems.slides.setdefault(slide_id, []).append(f"{message} [{code}]")
                problems.slide_rows.append([slide_id, code, message, str(entry.get("stage", ""))])
        return problems

    def tables(self) -> Iterator[dict[str, Any]]:
        """Quarantined slides with reasons, then slides with quarantined regions."""
        if self.slide_rows:
            yield {
                "columns": ["slide", "reason", "message", "stage"],
                "rows": self.slide_rows[:_MAX_LISTED],
                "caption": _listed("Quarantined slides", len(self.slide_rows)),
            }
        if self.region_codes:
            most = self.regions.most_common(_MAX_LISTED)
            yield {
                "columns": ["slide", "regions left out", "reasons"],
                "rows": [
                    [slide_id, count, _tally(self.region_codes[slide_id])]
                    for slide_id, count in most
                ],
                "caption": _listed("Slides with quarantined regions", len(self.region_codes)),
            }


def _listed(what: str, number: int) -> str:
    if number <= _MAX_LISTED:
        return f"{what}: {number:,}"
    return f"{what}: the first {_MAX_LISTED} of {number:,}, all are in quarantine.parquet"


def _tally(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count:,}" for name, count in ordered)


@dataclass
class _Totals:
    """Sums for the head of the page."""

    status: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    readers: Counter[str] = field(default_factory=Counter)
    tiles: int = 0
    nuclei: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        self.status["ok" if row["status"] == "ok" else "quarantined"] += 1
        self.tiles += row["tiles"] or 0
        self.nuclei += row["nuclei"] or 0
        if row["mpp_source"]:
            self.sources[row["mpp_source"]] += 1
        if row["reader"]:
            self.readers[row["reader"]] += 1

    def facts(self, problems: _Problems) -> dict[str, Any]:
        return {
            "slides": self.status.total(),
            "usable": self.status["ok"],
            "quarantined slides": self.status["quarantined"],
            "quarantined regions": problems.regions.total(),
            "tiles": self.tiles,
            "nuclei": self.nuclei,
            "mpp from": _tally(self.sources) or None,
            "readers": _tally(self.readers) or None,
        }


class _RowFiles:
    """Writes rows to numbered files, 500 in each."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder = folder
        self._prefix = prefix
        self._rows: list[dict[str, Any]] = []
        self._files: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _ROWS_PER_FILE:
            self._write()

    def close(self) -> list[dict[str, Any]]:
        """The files written: `[{"src": relative URL, "count": rows in it}]`."""
        if self._rows:
            self._write()
        return self._files

    def _write(self) -> None:
        name = f"rows-{self._prefix}{len(self._files):05d}.js"
        # Sent through a page element, never parsed as HTML; escaped all the same.
        data = json.dumps(self._rows, separators=(",", ":")).replace("<", "\\u003c")
        atomic_write_text(self._folder / name, f"cytorayRows({json.dumps(name)},{data});\n")
        self._files.append({"src": f"qc/{name}", "name": name, "count": len(self._rows)})
        self._rows = []


def _row(row: Mapping[str, Any], out: Path, problems: _Problems) -> dict[str, Any]:
    """One slide as the page's script reads it."""
    row = json_ready(row)
    slide_id = str(row["slide_id"])
    status = str(row.get("status") or "ok")
    reason = row.get("reason") or "; ".join(problems.slides.get(slide_id, ()))
    mpp = row.get("mpp_x") or row.get("mpp")
    size = [row.get("width_px_level0"), row.get("height_px_level0")]
    bad_regions = problems.regions.get(slide_id, 0)
    facts = [
        ["size", f"{size[0]:,} x {size[1]:,} px" if size[0] and size[1] else None],
        ["um per px", _join(mpp, row.get("mpp_source"))],
        ["reader", _join(row.get("reader"), row.get("vendor"))],
        ["foreground", _percent(row.get("foreground_share"))],
        ["tiles", row.get("num_tiles")],
        ["nuclei", row.get("num_nuclei")],
        ["regions left out", bad_regions or None],
        ["site", row.get("site")],
        ["path", row.get("path")],
    ]
    return {
        "id": slide_id,
        "status": status,
        "reason": str(reason or ""),
        "share": row.get("foreground_share"),
        "tiles": row.get("num_tiles"),
        "nuclei": row.get("num_nuclei"),
        "regions": bad_regions,
        "mpp": mpp,
        "mpp_source": row.get("mpp_source"),
        "reader": row.get("reader"),
        "facts": [[name, text_of(value)] for name, value in facts if value not in (None, "")],
        "images": [_image_url(row, slide_id, kind, out) for kind in IMAGE_KINDS],
    }


def _join(value: Any, source: Any) -> str | None:
    if value in (None, ""):
        return None
    return f"{text_of(value)} ({source})" if source else text_of(value)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def _image_url(row: Mapping[str, Any], slide_id: str, kind: str, out: Path) -> str:
    """URL of a picture relative to the page; empty when there is none."""
    given = row.get(f"{kind}_path")
    path = Path(given) if given else Path("qc") / f"{slide_id}.{kind}.jpg"
    if not given and not (out / path).exists():
        return ""
    if path.is_absolute():
        path = Path(os.path.relpath(path, out.resolve()))
    return quote(path.as_posix())
