import csv

import pytest

from cytoray.errors import InputError
from cytoray.synthetic import SynthConfig, plan_slides, synthesize


def test_manifest_lists_every_slide_with_a_relative_path(config, folder):
    with open(folder / "manifest.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["slide_id", "path", "patient_id", "site", "label", "split"]
    for row, plan in zip(rows, plan_slides(config), strict=True):
        assert (row["slide_id"], row["label"]) == (plan.slide_id, str(plan.label))
        assert (folder / row["path"]).is_file()
        assert (folder / "truth" / f"{row['slide_id']}.json").is_file()
    assert not list(folder.rglob("*.tmp"))


def test_a_second_call_makes_only_what_is_missing_and_the_same_bytes(tmp_path):
    config = SynthConfig(num_slides=3, held_out=1, size_px=512)
    synthesize(config, tmp_path)
    paths = [tmp_path / plan.path for plan in plan_slides(config)]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}
    (tmp_path / plan_slides(config)[1].truth_path).unlink()
    calls: list[tuple[int, int]] = []
    synthesize(config, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 3), (3, 3)]
    changed = [path.stat().st_mtime_ns != before[path][0] for path in paths]
    assert changed == [False, True, False]
    assert all(path.read_bytes() == before[path][1] for path in paths)


def test_worker_processes_make_the_same_slides(tmp_path):
    config = SynthConfig(num_slides=3, held_out=1, size_px=512)
    alone = synthesize(config, tmp_path / "alone")
    together = synthesize(config, tmp_path / "together", workers=2)
    assert alone.read_bytes() == together.read_bytes()
    for plan in plan_slides(config):
        for name in (plan.path, plan.truth_path):
            assert (alone.parent / name).read_bytes() == (together.parent / name).read_bytes()


def test_a_folder_of_another_config_is_refused(config, folder):
    other = SynthConfig(num_slides=6, held_out=2, size_px=1024, seed=99)
    with pytest.raises(InputError, match="another config"):
        synthesize(other, folder)


def test_a_foreign_manifest_is_not_overwritten(tmp_path):
    (tmp_path / "manifest.csv").write_text("slide_id,path\n")
    with pytest.raises(InputError, match="not made by synth"):
        synthesize(SynthConfig(num_slides=1, held_out=0, size_px=512), tmp_path)
    assert (tmp_path / "manifest.csv").read_text() == "slide_id,path\n"


def test_bad_arguments_are_refused(tmp_path):
    config = SynthConfig(num_slides=1, held_out=0, size_px=512)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        synthesize(config, tmp_path / "file")
    with pytest.raises(InputError, match="workers"):
        synthesize(config, tmp_path / "new", workers=0)
