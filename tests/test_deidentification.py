"""Nothing of a patient leaves the slide: not in tables, pages, pictures, logs or MLflow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from cytoray.errors import SlideError
from cytoray.slides import READERS, open_slide, read_quarantine, read_slide_table
from cytoray.synthetic import SynthConfig, corrupt_tile, make_slide, truncate

from .conftest import MPP, TILE_PX
from .planted import (
    ACCESSION,
    BORN,
    NAME,
    leaks_in,
    pictures_under,
    shows_photograph,
    texts_under,
    write_planted_mirax,
    write_planted_photo,
    write_planted_svs,
)

PSEUDONYM = "pseudonym-4711"
SIZE_PX = 1024
STATUS = {
    "good.svs": ("ok",),
    "torn.svs": ("ok",),
    "photo.png": ("ok",),
    "photo.jpg": ("ok",),
    "cut.svs": ("not_a_slide", "decode_error", "truncated"),
    "cut.png": ("decode_error",),
    "cut.jpg": ("decode_error",),
    "no_scale.svs": ("mpp_missing",),
    "bad_scale.svs": ("mpp_missing",),
    "two_scales.svs": ("mpp_contradiction",),
    "bad_tag.svs": ("decode_error",),
    "index.mrxs": ("decode_error",),
}


def rgb_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A folder of slides, good and bad, full of one patient's data."""
    folder = tmp_path_factory.mktemp("planted")
    config = SynthConfig(num_slides=1, held_out=0, size_px=SIZE_PX, mpp=MPP, seed=3)
    pixels = make_slide(config, 0).pixels
    good = write_planted_svs(folder / "good.svs", pixels)
    corrupt_tile(good, folder / "torn.svs", 5)
    truncate(good, folder / "cut.svs", 0.3)
    write_planted_svs(folder / "no_scale.svs", pixels, scale="")
    write_planted_svs(folder / "bad_scale.svs", pixels, scale=f"|AppMag = {NAME}|MPP = {NAME}")
    write_planted_svs(folder / "two_scales.svs", pixels, scale="|AppMag = 40|MPP = 0.5")
    write_planted_mirax(folder / "index.mrxs")
    for suffix in (".png", ".jpg"):
        photo = write_planted_photo(folder / f"photo{suffix}", pixels)
        truncate(photo, folder / f"cut{suffix}", 0.6)
    with tifffile.TiffFile(good) as tiff:
        width_tag = tiff.pages.first.tags["ImageWidth"].offset
    content = bytearray(good.read_bytes())
    content[width_tag + 2] = 12  # a double: libtiff and OpenSlide complain
    (folder / "bad_tag.svs").write_bytes(content)
    return folder


def test_the_secrets_are_where_others_would_find_them(planted) -> None:
    """Else nothing below would mean anything."""
    with openslide.OpenSlide(planted / "good.svs") as slide:
        assert slide.properties["aperio.Patient"] == NAME
        assert slide.properties["aperio.Barcode"] == ACCESSION
        assert slide.properties["tiff.DateTime"] == BORN
        assert {"label", "macro"} <= set(slide.associated_images)
        for name in ("label", "macro"):
            assert shows_photograph(rgb_of(slide.associated_images[name]))
    with pytest.raises(openslide.OpenSlideError, match="JANEPLANTED"):
        openslide.OpenSlide(planted / "index.mrxs")
    raw = dict(texts_under(planted))
    for name in ("cut.svs", "cut.png", "cut.jpg", "bad_scale.svs"):
        assert leaks_in(raw[planted / name]) or leaks_in((planted / name).read_text("latin-1"))


@pytest.mark.parametrize("reader", sorted(READERS))
def test_no_reader_lets_anything_out(planted, reader, capfd, caplog) -> None:
    opened, said = 0, ""
    for name in STATUS:
        try:
            with open_slide(str(planted / name), reader=reader) as slide:
                opened += 1
                assert leaks_in(repr(slide.info)) == []
                assert leaks_in(repr(vars(slide))) == []
                assert not shows_photograph(slide.thumbnail(512))
                for level, (width, height) in enumerate(slide.info.level_dimensions):
                    assert not shows_photograph(slide.read_level(level, 0, 0, width, height))
        except SlideError as error:
            said += f"{error!r} {error} {error.region}"
    assert opened >= 3
    assert len(said) > 200
    assert leaks_in(said + "".join(capfd.readouterr()) + caplog.text) == []


@pytest.mark.ray
def test_an_index_holds_nothing_of_the_patient(ray_cluster, planted, tmp_path, capfd) -> None:
    import ray

    from pipelines import index

    rows = [
        f"{name.replace('.', '_')},{name},{PSEUDONYM},{'' if name.endswith('.svs') else MPP}"
        for name in STATUS
    ]
    manifest = planted / "manifest.csv"
    manifest.write_text("\n".join(["slide_id,path,patient_id,mpp", *rows, ""]))
    out = tmp_path / "index"
    index.run(index.Config(manifest=manifest, out=out, tile_px=TILE_PX, mpp=MPP))
    printed = "".join(capfd.readouterr())

    slides = read_slide_table(out / "slides.parquet").to_pylist()
    status = {Path(row["path"]).name: row["status"] for row in slides}
    assert {name for name in STATUS if status[name] not in STATUS[name]} == set()
    assert any(row["region"] for row in read_quarantine(out / "quarantine.parquet").to_pylist())
    assert {row["patient_id"] for row in slides} == {PSEUDONYM}  # the user's own, kept in tables

    written = list(texts_under(out))
    assert len(written) > 50
    assert [(path.name, leaks_in(text)) for path, text in written if leaks_in(text)] == []
    pictures = list(pictures_under(out))
    assert len(pictures) == 4 * list(status.values()).count("ok")
    assert [path.name for path, pixels in pictures if shows_photograph(pixels)] == []
    pages = [(path, text) for path, text in written if path.suffix in (".html", ".js", ".jpg")]
    own = (PSEUDONYM, str(planted / "good.svs"), str(planted / "cut.svs"), str(planted / "index"))
    assert [(path.name, leaks_in(text, own)) for path, text in pages if leaks_in(text, own)] == []
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())  # type: ignore[attr-defined]
    said = printed + "".join(text for _, text in texts_under(logs))
    assert "good" in printed or "index" in printed
    assert leaks_in(said) == []


@pytest.mark.ray
def test_patients_and_paths_stay_out_of_mlflow_and_the_reports(
    indexed, pretrained, embedded, tracking_uri, tmp_path
) -> None:
    """Of a run with a table of patients: `pretrain`, and `tune`, which reads the patients."""
    from cytoray.mil import MILConfig
    from pipelines import tune

    mil = MILConfig(epochs=1, patience=0, batch_bags=4, tiles_per_bag=2, eval_tiles=4)
    config = tune.Config(
        bags=(Path(embedded.summary["bags"]),),
        index=indexed.out,
        encoder=(pretrained.summary["encoder"],),
        out=tmp_path / "tune",
        aggregators=("mean",),
        lora_ranks=(0,),
        mil=mil,
        val_fraction=0.34,
        model_name="deidentified",
        tracking_uri=tracking_uri,
    )
    tune.run(config)
    rows = read_slide_table(indexed.out / "slides.parquet").to_pylist()
    patients = tuple({row["patient_id"] for row in rows})
    paths = tuple(row["path"] for row in rows)
    assert len(patients) == len(paths) == 8
    store = Path(tracking_uri.removeprefix("sqlite:///")).parent
    found = [(p.name, leaks_in(text, patients + paths)) for p, text in texts_under(store)]
    assert len(found) > 5
    assert [entry for entry in found if entry[1]] == []
    for page in (pretrained.out / "report.html", config.out / "report.html"):
        assert leaks_in(page.read_text(encoding="utf-8"), patients + paths) == []


@pytest.mark.ray
def test_a_failed_trials_message_loses_the_paths_of_slides(indexed) -> None:
    from pipelines import tune

    path = read_slide_table(indexed.out / "slides.parquet")["path"][3].as_py()
    said = tune.hide_paths({"a": f"no file at {path}; look"}, indexed.out)
    assert said == {"a": "no file at a slide's file; look"}
    assert tune.hide_paths({}, Path("/nowhere")) == {}
