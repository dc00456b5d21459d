"""The quality page of an index run: every slide with its pictures, the worst first.

A cohort may have a million slides, so neither the page nor its writer may hold them all. Pictures
are files beside the page. Each slide has one short entry in an index (what the page sorts and
filters by) and its words in a file of a hundred slides that is loaded when one of them is shown.
All of these are scripts, since a page opened from disk may load scripts and nothing else.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from cytoray.io import atomic_write_text
from cytoray.report.page import facts_of, render
from cytoray.report.qc_rows import IMAGE_KINDS, METRICS, Problems, describe
from cytoray.report.qc_totals import Totals

ROWS_PER_FILE = 100
INDEX_ROWS_PER_FILE = 10_000
CATEGORIES = ("reason", "mpp_source", "reader", "site", "split")
# Whom a slide is of, and where it lies, has no place on a page that is shown around.
PRIVATE = ("patient_id", "path")
_SCRIPTS = ("qc_data.js", "qc_state.js", "qc_charts.js", "qc_rows.js", "qc_page.js")
_MAX_CHOICES = 60


def write_qc(
    out_dir: str | Path,
    rows: Iterable[Mapping[str, Any]],
    quarantine: Iterable[Mapping[str, Any]] = (),
    title: str = "Slide quality",
    subtitle: str = "",
    labels: Sequence[str] = (),
) -> Path:
    """Write `qc.html` and the files it loads, `qc/*.js`.

    The files of an earlier page are taken away once the new page stands, so that whoever opens
    `qc.html` at any time sees a whole one.

    Args:
        out_dir: the run folder; pictures lie in its `qc/`.
        rows: one dict a slide, e.g. rows of the slide table (an iterator is read once): `slide_id`,
            `status` (`ok`, `quarantined` or a reason code) and, where known, `site`, `split`,
            `width_px_level0`, `height_px_level0`, `mpp` or `mpp_x`, `mpp_source`, `vendor`,
            `objective_power`, `reader`, `reader_reason`, `foreground_share`, `num_tiles`,
            `num_nuclei`, `focus_median` (0..1), `out_of_focus_share` (of the tiles), and
            `thumbnail_path`, `foreground_path`, `density_path`, `focus_path` (absolute, or
            relative to `out_dir`; by default `qc/<slide_id>.<kind>.jpg` where that exists).
            Nothing else of a row reaches the page.
        quarantine: dicts of `slide_id`, `reason_code`, `message`, `region` (empty for a whole
            slide), `stage`, and `path`, which is taken out of the message.
        title: of the page.
        subtitle: a line below it; of a path, its last part is shown.
        labels: columns of `rows` that hold labels of slides, to show and to filter by.

    Returns:
        The path of `qc.html`.
    """
    out = Path(out_dir)
    folder = out / "qc"
    folder.mkdir(parents=True, exist_ok=True)
    stale = list(folder.glob("*.js"))
    name = secrets.token_hex(4)
    labels = [label for label in labels if label not in (*PRIVATE, *CATEGORIES)]
    problems, totals = Problems.of(quarantine), Totals()
    writer = _Files(folder, name, (*CATEGORIES, *labels))
    for row in rows:
        shown = describe(row, problems, out, labels)
        totals.add(shown)
        writer.add(shown.index_entry(), shown.words)
    meta = writer.close() | {"kinds": IMAGE_KINDS}
    script = f"{name}-page.js"
    atomic_write_text(folder / script, _script())
    html = render(
        "qc.html",
        title=title,
        subtitle=Path(subtitle).name if "/" in subtitle or "\\" in subtitle else subtitle,
        facts=facts_of(totals.facts(problems)),
        reasons=totals.reasons(),
        meta=meta,
        script=f"qc/{script}",
        choices=_choices(meta["categories"]),
    )
    atomic_write_text(out / "qc.html", html)
    for path in stale:
        path.unlink(missing_ok=True)
    return out / "qc.html"


def _choices(categories: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The menus of the toolbar: whatever has more than one value and not too many."""
    return [
        {"name": name, "values": sorted(values[1:])}
        for name, values in categories.items()
        if name != "reason" and 2 <= len(values) - 1 <= _MAX_CHOICES
    ]


def _script() -> str:
    templates = resources.files("cytoray.report") / "templates"
    parts = [(templates / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    return "\n".join(['"use strict";', "(function () {", *parts, "})();", ""])


class _Files:
    """Writes the index and the words of the slides to numbered files; holds one of each."""

    def __init__(self, folder: Path, name: str, categories: Sequence[str]) -> None:
        self._folder, self._name = folder, name
        self._codes: dict[str, dict[str, int]] = {c: {"": 0} for c in categories}
        self._entries: list[dict[str, Any]] = []
        self._words: list[dict[str, Any]] = []
        self._count = self._num_index_files = self._num_word_files = 0

    def add(self, entry: dict[str, Any], words: dict[str, Any]) -> None:
        """Take a slide.

        Args:
            entry: its short entry: `id`, numbers by name, texts by category.
            words: what is shown of it beside.
        """
        for category, codes in self._codes.items():
            entry[category] = codes.setdefault(entry[category], len(codes))
        self._entries.append(entry)
        self._words.append(words)
        self._count += 1
        if len(self._entries) == INDEX_ROWS_PER_FILE:
            self._write_index()
        if len(self._words) == ROWS_PER_FILE:
            self._write_words()

    def close(self) -> dict[str, Any]:
        """Write what is left; returns what the page must know about the files."""
        if self._entries:
            self._write_index()
        if self._words:
            self._write_words()
        return {
            "slides": self._count,
            "prefix": f"qc/{self._name}",
            "index_files": self._num_index_files,
            "index_rows": INDEX_ROWS_PER_FILE,
            "rows": ROWS_PER_FILE,
            "metrics": METRICS,
            "categories": {name: list(codes) for name, codes in self._codes.items()},
        }

    def _write_index(self) -> None:
        columns = {name: [e[name] for e in self._entries] for name in self._entries[0]}
        self._write("index", self._num_index_files, columns)
        self._num_index_files += 1
        self._entries = []

    def _write_words(self) -> None:
        self._write("rows", self._num_word_files, self._words)
        self._num_word_files += 1
        self._words = []

    def _write(self, kind: str, number: int, data: Any) -> None:
        # Loaded as a script, never parsed as HTML; escaped all the same.
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        atomic_write_text(
            self._folder / f"{self._name}-{kind}-{number:05d}.js",
            f'cytorayQc("{kind}",{number},{text});\n',
        )
