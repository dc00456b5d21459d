"""The report page: one self-contained HTML file made from plain dicts. Nothing is fetched."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

import cytoray
from cytoray.io import atomic_write_text

_SECTION_FIELDS = {"title", "text", "facts", "code", "tables", "figures"}
_FIGURE_FIELDS = {"image", "caption", "alt", "wide"}
_TABLE_FIELDS = {"columns", "rows", "caption", "marked"}

# Figures are drawn at 144 dpi for sharp screens: shown at half a pixel each, they keep their size.
_SCREEN_SCALE = 2 / 3
_HEAVY_PNG_BYTES = 300_000


def write_report(
    path: str | Path,
    sections: Sequence[Mapping[str, Any]],
    title: str = "Run report",
    subtitle: str = "",
) -> Path:
    """Write a report as one HTML file that needs no network and no script.

    Args:
        path: the file, e.g. `RunFolder.report_path`.
        sections: dicts with `title` and any of
            `facts`: mapping or pairs of name and value, the key numbers;
            `text`: a paragraph, or several (list of str);
            `code`: text shown as typed, e.g. a command;
            `tables`: dicts of `columns`, `rows` (sequences or dicts by column), optional
            `caption` and `marked` (indices of highlighted rows); see `trial_table`;
            `figures`: dicts of `image` (PNG or JPEG bytes), optional `caption`, `alt`, `wide`.
            All text is escaped.
        title: of the page.
        subtitle: a line below it, e.g. the run folder.

    Returns:
        `path`.

    Raises:
        ValueError: a dict has a field not named above, or an image is neither PNG nor JPEG.
    """
    shown = [_section(number, section) for number, section in enumerate(sections, 1)]
    html = render("report.html", title=title, subtitle=subtitle, sections=shown)
    atomic_write_text(path, html)
    return Path(path)


def trial_table(
    trials: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    best: int | str | None = None,
    caption: str = "",
) -> dict[str, Any]:
    """A `tables` entry for trials of a search.

    Args:
        trials: one dict a trial.
        columns: which fields, in order; None for all, in the order they first appear.
        best: the trial to highlight: its index, or its `trial_id`.
        caption: above the table.
    """
    names = list(columns or dict.fromkeys(name for trial in trials for name in trial))
    ids = [trial.get("trial_id") for trial in trials]
    position = ids.index(best) if isinstance(best, str) and best in ids else best
    marked = [position] if isinstance(position, int) else []
    rows = [[trial.get(name) for name in names] for trial in trials]
    return {"columns": names, "rows": rows, "caption": caption, "marked": marked}


def render(template: str, **values: Any) -> str:
    """Fill one of the package's templates; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("cytoray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(
        version=cytoray.__version__, written=written, **values
    )


def text_of(value: Any) -> str:
    """A value as a reader wants it: four digits, thousands separated, an en dash for nothing."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(text_of(item) for item in value)
    return str(value)


def facts_of(facts: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> list[dict[str, str]]:
    """Key numbers for the template."""
    pairs = facts.items() if isinstance(facts, Mapping) else facts
    return [{"name": str(name), "value": text_of(value)} for name, value in pairs]


def table_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table for the template: cells as text; columns that hold only numbers flush right."""
    _check_fields("table", table, _TABLE_FIELDS)
    columns = [str(column) for column in table["columns"]]
    rows = [
        [row.get(column) for column in table["columns"]] if isinstance(row, Mapping) else list(row)
        for row in table["rows"]
    ]
    ragged = [number for number, row in enumerate(rows) if len(row) != len(columns)]
    if ragged:
        raise ValueError(f"row {ragged[0]} of the table does not have {len(columns)} cells")
    return {
        "columns": [column.replace("_", " ") for column in columns],
        "rows": [[text_of(cell) for cell in row] for row in rows],
        "numeric": [i for i in range(len(columns)) if _all_numbers([row[i] for row in rows])],
        "caption": str(table.get("caption", "")),
        "marked": list(table.get("marked", ())),
    }


def _all_numbers(cells: Sequence[Any]) -> bool:
    filled = [cell for cell in cells if cell is not None]
    flags = (bool, np.bool_)
    return bool(filled) and all(isinstance(c, Number) and not isinstance(c, flags) for c in filled)


def _section(number: int, section: Mapping[str, Any]) -> dict[str, Any]:
    _check_fields("section", section, _SECTION_FIELDS)
    text = section.get("text") or ()
    slug = re.sub(r"[^a-z0-9]+", "-", str(section["title"]).lower()).strip("-")
    return {
        "title": str(section["title"]),
        "anchor": f"s{number}-{slug}",
        "paragraphs": [text] if isinstance(text, str) else list(text),
        "facts": facts_of(section.get("facts") or ()),
        "code": section.get("code", ""),
        "tables": [table_of(table) for table in section.get("tables") or ()],
        "figures": [_figure(figure) for figure in section.get("figures") or ()],
    }


def _figure(figure: Mapping[str, Any]) -> dict[str, Any]:
    """Inline an image; its size in the page is the size it was drawn at."""
    _check_fields("figure", figure, _FIGURE_FIELDS)
    image, kind, width, height = _light_image(bytes(figure["image"]))
    caption = str(figure.get("caption", ""))
    wide = bool(figure.get("wide", width * _SCREEN_SCALE > 700))
    return {
        "source": f"data:image/{kind};base64,{base64.b64encode(image).decode()}",
        "width": width,
        "height": height,
        "alt": str(figure.get("alt", caption)),
        "caption": caption,
        "wide": wide,
        "max_width": None if wide else round(width * _SCREEN_SCALE),
    }


def _light_image(image: bytes) -> tuple[bytes, str, int, int]:
    """(bytes, kind, width, height); a large PNG, which holds photographs, is stored as JPEG."""
    if not image.startswith((b"\x89PNG", b"\xff\xd8\xff")):
        raise ValueError("a figure's image must be PNG or JPEG bytes")
    opened = Image.open(io.BytesIO(image))
    kind = "png" if opened.format == "PNG" else "jpeg"
    if kind == "png" and len(image) > _HEAVY_PNG_BYTES:
        stream = io.BytesIO()
        opened.convert("RGB").save(stream, format="JPEG", quality=90, subsampling=0)
        if len(stream.getvalue()) < len(image):
            image, kind = stream.getvalue(), "jpeg"
    return image, kind, opened.width, opened.height


def _check_fields(what: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"unknown {what} field {unknown[0]!r}; valid: {', '.join(sorted(known))}")
