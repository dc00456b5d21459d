import re

import numpy as np
import pytest

from cytoray.report import (
    encode_jpeg,
    foreground_overlay,
    message_figure,
    trial_table,
    write_report,
)
from cytoray.report.page import text_of

EVIL = '<script>alert("x")</script>'


def written(tmp_path, sections, **kwargs):
    return write_report(tmp_path / "report.html", sections, **kwargs).read_text()


def test_page_holds_everything_given(tmp_path):
    png = message_figure("hello")
    jpeg = encode_jpeg(np.zeros((20, 30, 3), np.uint8))
    html = written(
        tmp_path,
        [
            {
                "title": "Result",
                "facts": {"AUC": 0.93124, "slides": 1200},
                "text": ["One.", "Two."],
            },
            {
                "title": "Figures",
                "figures": [{"image": png, "caption": "a curve"}, {"image": jpeg, "alt": "black"}],
                "code": "mlflow ui --host 127.0.0.1",
            },
        ],
        title="Quickstart",
        subtitle="/runs/1",
    )
    for text in ("Quickstart", "/runs/1", "0.9312", "1,200", "<p>One.</p>", "a curve", "mlflow ui"):
        assert text in html
    assert html.count('src="data:image/png;base64,') == 1
    assert html.count('src="data:image/jpeg;base64,') == 1
    assert 'width="30" height="20" alt="black"' in html
    assert "research use only" in html
    assert [m for m in re.findall(r'href="#([^"]+)"', html) if f'id="{m}"' not in html] == []


def test_page_is_self_contained_and_may_not_fetch(tmp_path):
    html = written(tmp_path, [{"title": "a", "figures": [{"image": message_figure("x")}]}])
    assert not re.search(r"https?://|//cdn|@import|url\(", html)
    assert "default-src 'none'" in html
    assert "<script" not in html
    for source in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert source.startswith(("data:", "#"))


def test_all_text_is_escaped(tmp_path):
    html = written(
        tmp_path,
        [
            {
                "title": EVIL,
                "text": EVIL,
                "code": EVIL,
                "facts": {EVIL: EVIL},
                "tables": [{"columns": [EVIL], "rows": [[EVIL]], "caption": EVIL}],
                "figures": [{"image": message_figure("x"), "caption": EVIL, "alt": EVIL}],
            }
        ],
        title=EVIL,
        subtitle=EVIL,
    )
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 11


def test_trial_table_marks_the_best(tmp_path):
    trials = [
        {"trial_id": "a", "aggregator": "mean", "auc": 0.81234567, "epochs": 3},
        {"trial_id": "b", "aggregator": "abmil", "auc": None, "lora_rank": np.int64(4)},
    ]
    table = trial_table(trials, best="b", caption="trials")
    assert table["columns"] == ["trial_id", "aggregator", "auc", "epochs", "lora_rank"]
    assert table["marked"] == [1]
    html = written(tmp_path, [{"title": "Tuning", "tables": [table]}])
    assert '<td class="number">0.8123</td>' in html
    assert "<td>abmil</td>" in html
    assert html.index('class="marked"') > html.index("<td>mean</td>")
    assert "lora rank" in html
    assert trial_table(trials, columns=["auc"], best=0)["rows"] == [[0.81234567], [None]]
    assert trial_table(trials)["marked"] == []


def test_tables_of_dicts_and_flags(tmp_path):
    table = {"columns": ["id", "ok"], "rows": [{"id": "s1", "ok": True}, {"id": "s2"}]}
    html = written(tmp_path, [{"title": "t", "tables": [table]}])
    assert "<td>yes</td>" in html
    assert 'class="number"' not in html


def test_numbers_are_readable():
    assert [text_of(v) for v in (0.000123456, 12345.6, 1234567, np.float32(0.5), True)] == [
        "0.0001235",
        "12,346",
        "1,234,567",
        "0.5",
        "yes",
    ]
    assert text_of(None) == text_of(float("nan")) == "\N{EN DASH}"
    assert text_of((0.9, "x")) == "0.9, x"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"title": "a", "plots": []}, "unknown section field 'plots'; valid: code, facts"),
        ({"title": "a", "figures": [{"image": b"GIF89a"}]}, "PNG or JPEG"),
        ({"title": "a", "figures": [{"png": b""}]}, "unknown figure field"),
        ({"title": "a", "tables": [{"columns": ["x"], "rows": [[1, 2]]}]}, "1 cells"),
    ],
)
def test_mistakes_are_named(tmp_path, section, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, [section])
    assert not (tmp_path / "report.html").exists()


def test_heavy_photographs_become_jpeg(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (700, 700, 3), dtype=np.uint8)
    png = foreground_overlay(noise, np.ones((7, 7), bool))
    html = written(tmp_path, [{"title": "a", "figures": [{"image": png}]}])
    assert "data:image/jpeg" in html
    assert len(html) < len(png)
