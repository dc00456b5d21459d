"""Slides with a patient's data planted wherever a scanner may leave it."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

NAME, BORN, ACCESSION = "DOE^JANEPLANTED", "1957:03:12 04:05:06", "ACC-2019-774310296"
SECRETS = (NAME, "JANEPLANTED", BORN, "1957:03:12", "19570312", ACCESSION, "774310296")
LABEL_RGB, MACRO_RGB = (0, 255, 0), (255, 0, 255)
PATIENT_FIELDS = f"|Patient = {NAME}|Barcode = {ACCESSION}|BirthDate = 19570312|Title = {NAME}"


def write_planted_svs(
    path: Path, pixels: np.ndarray, scale: str = "|AppMag = 20|MPP = 0.5", **more_tags: Any
) -> Path:
    """An Aperio-like file: tags and properties with secrets, a label and a macro photograph.

    Args:
        path: the file.
        pixels: uint8 (h, w, 3), level 0.
        scale: how its description states the scale.
        **more_tags: `extra`, further TIFF tags of level 0.
    """
    height, width = pixels.shape[:2]
    head = f"Aperio Image Library v12.0.15\r\n{width}x{height}"
    tags: list[Any] = [(315, "s", 0, NAME, True), (316, "s", 0, f"{NAME} workstation", True)]
    tags += [(306, "s", 0, BORN, True), (33432, "s", 0, ACCESSION, True)]
    common: dict[str, Any] = {"photometric": "rgb", "metadata": None, "software": NAME}
    tiled = {"tile": (256, 256), "compression": "jpeg", "compressionargs": {"level": 90}}
    with tifffile.TiffWriter(path) as writer:
        text = f"{head} (256x256) JPEG/RGB Q=90{scale}{PATIENT_FIELDS}"
        extra = tags + more_tags.get("extra", [])
        writer.write(pixels, description=text, extratags=extra, **tiled, **common)
        small = cv2.resize(pixels, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
        text = f"{head} -> {width // 4}x{height // 4} - |AppMag = 20{PATIENT_FIELDS}"
        writer.write(small, description=text, extratags=tags, **common)
        half = cv2.resize(pixels, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        text = f"{head} -> {width // 2}x{height // 2} JPEG/RGB{PATIENT_FIELDS}"
        writer.write(half, description=text, extratags=tags, subfiletype=1, **tiled, **common)
        for name, rgb in (("label", LABEL_RGB), ("macro", MACRO_RGB)):
            picture = photograph(rgb)
            size = f"{name} {picture.shape[1]}x{picture.shape[0]}"
            text = f"Aperio Image Library v12.0.15\r\n{size}{PATIENT_FIELDS}"
            kind = 1 if name == "label" else 9
            writer.write(picture, description=text, extratags=tags, subfiletype=kind, **common)
    return path


def photograph(rgb: tuple[int, int, int]) -> np.ndarray:
    """A label: a name written on paper of one colour."""
    picture = np.full((160, 400, 3), rgb, np.uint8)
    cv2.putText(picture, NAME, (5, 90), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (0, 0, 0), 2)
    return picture


def write_planted_photo(path: Path, pixels: np.ndarray) -> Path:
    """A PNG or JPEG with secrets in its text chunks or EXIF."""
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif.update({270: PATIENT_FIELDS, 315: NAME, 306: BORN, 316: ACCESSION})
    text = PngInfo()
    for key in ("Author", "Description", "Comment"):
        text.add_text(key, PATIENT_FIELDS)
    options: dict[str, Any] = {"pnginfo": text} if path.suffix == ".png" else {"quality": 90}
    if path.suffix == ".jpg":
        options["comment"] = PATIENT_FIELDS.encode()
    image.save(path, exif=exif, **options)
    return path


def write_planted_mirax(path: Path) -> Path:
    """A MIRAX slide whose index file is damaged in the line with the name."""
    folder = path.with_suffix("")
    folder.mkdir()
    path.write_bytes(b"\xff\xd8 no picture")
    (folder / "Slidedat.ini").write_text(f"[GENERAL]\nSLIDE_ID={ACCESSION}\nPATIENT {NAME}\n")
    return path


def texts_under(folder: Path) -> Iterator[tuple[Path, str]]:
    """All that is written below a folder, as text: raw bytes, and tables and databases decoded."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        yield path, data.decode("latin-1")
        yield path, data.decode("utf-16-le", "ignore")
        if path.suffix == ".parquet":
            schema = pq.read_schema(path)
            yield path, repr(schema.metadata) + repr(pq.ParquetFile(path).read().to_pylist())
        if path.suffix == ".db":
            with sqlite3.connect(path) as database:
                yield path, "\n".join(database.iterdump())


def leaks_in(text: str, words: tuple[str, ...] = SECRETS) -> list[str]:
    """The words that occur, whatever their case."""
    lower = text.lower()
    return [word for word in words if word.lower() in lower]


def pictures_under(folder: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Pictures in files, uint8 (h, w, 3)."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            yield path, np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))


def shows_photograph(pixels: np.ndarray) -> bool:
    """Whether any pixel has about the colour of the label or the macro photograph."""
    near = [
        (np.abs(pixels.astype(int) - rgb).max(axis=-1) < 45).any() for rgb in (LABEL_RGB, MACRO_RGB)
    ]
    return any(near)
