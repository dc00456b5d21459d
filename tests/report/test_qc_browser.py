"""The quality page in a real browser, from disk, driven by its address."""

import html
import re
import shutil
import subprocess

import numpy as np
import pytest

from cytoray.report import encode_jpeg, write_qc

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

NUM_SLIDES = 2000
EVIL = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


def slides():
    """Every 50th is quarantined, every 20th hazy; focus falls with the number."""
    for i in range(NUM_SLIDES):
        row = {"slide_id": f"s{i:04d}", "status": "ok", "split": ["train", "test"][i % 4 == 3]}
        if i % 50 == 7:
            yield row | {"status": ["no_nuclei", "missing_file"][i % 100 == 7]}
            continue
        yield row | {
            "num_tiles": 100 + i,
            "num_nuclei": 10 * (100 + i),
            "mpp_x": 0.25,
            "mpp_source": "file",
            "focus_median": round(1 - i / 2500, 6),
            "out_of_focus_share": 0.5 if i % 20 == 0 else 0.01,
        }


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    out = tmp_path_factory.mktemp("cohort")
    picture = encode_jpeg(np.full((40, 60, 3), 200, np.uint8))
    (out / "qc").mkdir()
    for i in (0, 1, 60):
        (out / "qc" / f"s{i:04d}.thumbnail.jpg").write_bytes(picture)
    quarantine = [
        {"slide_id": row["slide_id"], "reason_code": row["status"], "message": "why it is out"}
        for row in slides()
        if row["status"] != "ok"
    ]
    quarantine += [
        {"slide_id": "s0001", "reason_code": "decode_error", "message": "torn", "region": f"r{i}"}
        for i in range(3)
    ]
    return write_qc(out, slides(), quarantine)


@pytest.fixture
def dom(tmp_path):
    """dom(page, hash) -> the document after its scripts ran."""

    def opened(page, address=""):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        flags += ["--virtual-time-budget=10000", f"--user-data-dir={tmp_path}/profile"]
        command = [BROWSER, *flags, "--dump-dom", page.as_uri() + address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert 'data-ready="' in done.stdout, done.stdout[-2000:]
        return done.stdout

    return opened


def shown(text):
    return [html.unescape(name) for name in re.findall(r'<tr[^>]* data-slide="([^"]*)"', text)]


def where(text):
    return re.search(r'id="where"[^>]*>([^<]*)<', text).group(1)


def test_the_worst_come_first_and_pages_can_be_turned(cohort, dom):
    text = dom(cohort)
    assert where(text) == "1 to 25 of 2,000 slides"
    gone = [f"s{i:04d}" for i in range(NUM_SLIDES) if i % 50 == 7]
    assert shown(text) == sorted(gone, key=lambda name: int(name[1:]) % 100)[:25]
    assert text.count("why it is out") >= 25
    assert "<img" not in text  # nothing but the visible page's pictures, and these have none
    text = dom(cohort, "#page=2&size=25")
    assert where(text) == "26 to 50 of 2,000 slides"
    assert shown(text)[15:] == [f"s{i:04d}" for i in range(0, 200, 20)]  # then the hazy ones
    assert text.count("<img") == 2
    assert 'src="qc/s0060.thumbnail.jpg"' in text


def test_sorting_by_a_column_and_filtering_by_a_reason(cohort, dom):
    text = dom(cohort, "#sort=focus&page=2")
    usable = [f"s{i:04d}" for i in reversed(range(NUM_SLIDES)) if i % 50 != 7]
    assert shown(text) == usable[25:50]
    assert re.search(r'aria-sort="ascending"><button[^>]*data-sort="focus"', text)
    text = dom(cohort, "#sort=id&dir=desc&reason=no_nuclei&size=50")
    assert shown(text) == [f"s{i:04d}" for i in reversed(range(57, NUM_SLIDES, 100))]
    assert "reason: no nuclei" in text


def test_filters_add_up_and_the_charts_follow(cohort, dom):
    text = dom(cohort, "#status=ok&is.split=test&tiles=200..300&sort=tiles&dir=asc&find=S01")
    expected = [f"s{i:04d}" for i in range(100, 200) if i % 4 == 3 and i % 50 != 7]
    assert where(text) == f"1 to {len(expected)} of {len(expected)} slides"
    assert shown(text) == expected
    assert re.search(
        r'aria-label="tiles per slide 200 to 300: 98 slides" aria-pressed="true"', text
    )
    assert text.count('class="chart"') == 4
    assert where(dom(cohort, "#find=nobody")) == "no such slide"


def test_a_slide_is_shown_large_with_its_regions(cohort, dom):
    text = dom(cohort, "#sort=id&slide=s0001")
    viewer = text[text.index("<dialog") : text.index("</dialog>")]
    assert ' open=""' in viewer
    assert "2 of 2,000" in viewer
    assert 'src="qc/s0001.thumbnail.jpg"' in viewer
    assert re.findall(r"<code>(r\d)</code>", viewer) == ["r0", "r1", "r2"]


def test_names_are_text_whatever_they_hold(tmp_path, dom):
    row = {"slide_id": EVIL, "status": EVIL, "site": EVIL, "reader": EVIL, "vendor": EVIL}
    row |= {"thumbnail_path": "javascript:document.title='broken'"}
    quarantine = [{"slide_id": EVIL, "reason_code": EVIL, "message": EVIL}]
    quarantine += [quarantine[0] | {"region": EVIL}]
    other = {"slide_id": "other", "site": "<b>x</b>", "num_tiles": 3}
    text = dom(write_qc(tmp_path, [row, other], quarantine, EVIL, EVIL), "#find=script")
    assert shown(text) == [EVIL]
    assert f"<title>{html.escape(EVIL, quote=False)}</title>".replace("&#x27;", "'") in text
    assert "<img src=x" not in text
    assert len(re.findall(r"<script", text)) == 2


def test_a_page_without_slides_says_so(tmp_path, dom):
    assert where(dom(write_qc(tmp_path, []))) == "no such slide"
