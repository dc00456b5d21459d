from __future__ import annotations

import h5py
import numpy as np
import pyarrow as pa

from benchmarks.made_study import make_index
from cytoray.mil import open_bags
from pipelines.cli import main


def write_h5(path, size: int, width: int = 4, **attributes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = np.random.default_rng(size).normal(size=(size, width)).astype("f4")
        file["coords"] = np.arange(2 * size).reshape(-1, 2) * 512
        file["coords"].attrs.update(attributes)


def test_features_of_other_tools_go_in_and_out(tmp_path, capsys) -> None:
    for name, size in (("s000", 3), ("s001", 7)):
        write_h5(tmp_path / "clam" / "h5_files" / f"{name}.h5", size, patch_size=256)
    source = ["bags", "--source", str(tmp_path / "clam")]
    bags = ["--out", str(tmp_path / "bags")]
    assert main([*source, *bags]) == 2
    said = capsys.readouterr().err
    assert said.count("does not say mpp") == 2, "every file at once"
    facts = ["--facts.mpp", "0.5", "--facts.tile-size-level0", "512", "--facts.encoder-name", "uni"]
    assert main([*source, *bags, *facts]) == 0
    store = open_bags(tmp_path / "bags")
    assert [len(bag) for bag in store] == [3, 7]
    assert store.check().meta.encoder_name == "uni"
    exported = ["bags", "--source", str(tmp_path / "bags"), "--out", str(tmp_path / "h5")]
    assert main([*exported, "--to", "hdf5"]) == 0
    with h5py.File(tmp_path / "h5" / "s001.h5") as file:
        assert np.array_equal(file["features"][()], store.read("s001").features)
    assert "uni" in capsys.readouterr().out


def test_slides_the_index_does_not_know_are_named(tmp_path, capsys) -> None:
    index = make_index(tmp_path, [{"slide_id": "s000", "patient_id": "p", "label": 0}],
                       {"label": pa.int64()})  # fmt: skip
    for name in ("s000", "stranger"):
        write_h5(tmp_path / "in" / f"{name}.h5", 2, patch_size=256, patch_size_level0=512, mpp=0.5)
    command = ["bags", "--source", tmp_path / "in", "--out", tmp_path / "b", "--index", index]
    assert main([str(word) for word in command]) == 2
    assert "bag stranger: no such slide is known" in capsys.readouterr().err
    assert open_bags(tmp_path / "b").slide_ids == ["s000"]
