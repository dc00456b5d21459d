"""Sums over all slides for the head of the quality page, in memory that does not grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cytoray.report.qc_rows import Problems, QcRow


@dataclass
class Totals:
    """Counts of slides by outcome, reason and source; sums of tiles and nuclei."""

    usable: int = 0
    warned: int = 0
    tiles: int = 0
    nuclei: int = 0
    judged_tiles: int = 0
    blurred_tiles: float = 0.0
    by_reason: Counter[str] = field(default_factory=Counter)
    by_source: Counter[str] = field(default_factory=Counter)
    by_reader: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)

    def add(self, row: QcRow) -> None:
        """Count a slide."""
        reason = row.categories["reason"]
        tiles, blurred = int(row.metrics["tiles"] or 0), row.metrics["blurred"]
        self.tiles += tiles
        self.nuclei += int(row.metrics["nuclei"] or 0)
        if blurred is not None:
            self.judged_tiles += tiles
            self.blurred_tiles += blurred * tiles
        self.by_source.update(filter(None, [row.categories["mpp_source"]]))
        self.by_reader.update(filter(None, [row.categories["reader"]]))
        if row.usable:
            self.usable += 1
            self.warned += bool(row.metrics["warnings"])
            return
        self.by_reason[reason] += 1
        for code, message, _ in row.words["problems"]:
            if code == reason:
                self.example.setdefault(reason, message)

    def facts(self, problems: Problems) -> dict[str, Any]:
        """Key numbers, in the order they are shown."""
        facts: dict[str, Any] = {
            "slides": self.usable + self.by_reason.total(),
            "usable": self.usable,
            "usable, worth a look": self.warned,
            "quarantined": self.by_reason.total(),
            "regions left out": problems.num_regions.total(),
            "tiles": self.tiles,
            "nuclei": self.nuclei or None,
            "tiles out of focus": None,
            "um per px from": _tally(self.by_source),
            "readers": _tally(self.by_reader),
        }
        if self.judged_tiles:
            facts["tiles out of focus"] = f"{100 * self.blurred_tiles / self.judged_tiles:.1f} %"
        return {name: value for name, value in facts.items() if value is not None}

    def reasons(self) -> list[dict[str, Any]]:
        """Why slides were quarantined, most frequent first: code, words, count, share, example."""
        ordered = sorted(self.by_reason.items(), key=lambda item: (-item[1], item[0]))
        return [
            {
                "code": code,
                "words": code.replace("_", " "),
                "count": count,
                "percent": round(100 * count / ordered[0][1], 1),
                "example": self.example.get(code, ""),
            }
            for code, count in ordered
        ]


def _tally(counts: Mapping[str, int]) -> str | None:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count:,}" for name, count in ordered) or None
