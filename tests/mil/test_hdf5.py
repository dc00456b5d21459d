import dataclasses

import h5py
import numpy as np
import pytest
import torch

from cytoray.errors import InputError
from cytoray.mil.bags import open_bags, write_bag
from cytoray.mil.feature_files import TileFacts, read_feature_file
from cytoray.mil.hdf5 import export_hdf5, import_hdf5

from .test_bags import make_bag

FACTS = TileFacts(tile_px=256, mpp=0.5, tile_size_level0=512.0, encoder_name="uni")


def write_h5(path, features, coords=None, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        if features is not None:
            file["features"] = features
        if coords is None and features is not None:
            coords = np.arange(2 * features.shape[-2]).reshape(-1, 2) * 512
        if coords is not None:
            file["coords"] = coords
            file["coords"].attrs.update(attributes)
    return path


def features(size=5, width=4, seed=0):
    return np.random.default_rng(seed).normal(size=(size, width)).astype(np.float32)


def test_bags_go_out_and_come_back(tmp_path):
    bags = {name: make_bag(name, size) for name, size in (("a", 3), ("case 2/b", 7))}
    for bag in bags.values():
        write_bag(tmp_path / "bags", bag)
    files = export_hdf5(open_bags(tmp_path / "bags"), tmp_path / "h5")
    assert [path.name for path in files] == ["a.h5", "case 2%2Fb.h5"]
    back = import_hdf5(tmp_path / "h5", tmp_path / "back")
    assert back.slide_ids == ["a", "case 2/b"]
    for name, bag in bags.items():
        mine = back.read(name)
        assert mine.meta == bag.meta
        assert np.array_equal(mine.features, bag.features.astype(np.float32))
        assert np.abs(mine.coordinates_level0 - bag.coordinates_level0).max() <= 0.51


def test_the_exported_layout_is_the_usual_one(tmp_path):
    write_bag(tmp_path / "bags", make_bag("a", 6))
    (path,) = export_hdf5(open_bags(tmp_path / "bags"), tmp_path / "h5", ["a"])
    with h5py.File(path) as file:
        assert sorted(file) == ["coords", "features"]
        assert (file["features"].shape, file["features"].dtype) == ((6, 4), np.float32)
        assert (file["coords"].shape, file["coords"].dtype) == ((6, 2), np.int64)
        assert file["coords"].attrs["patch_size"] == 256
        assert file["coords"].attrs["patch_size_level0"] == 512
    assert len(list((tmp_path / "h5").iterdir())) == 1
    with pytest.raises(InputError, match="no bag for slide 'z'"):
        export_hdf5(open_bags(tmp_path / "bags"), tmp_path / "h5", ["a", "z"])


def test_trident_files_with_a_batch_axis_and_their_attributes(tmp_path):
    attributes = {"patch_size": 512, "patch_size_level0": 1024, "target_magnification": 20}
    corners = np.arange(10).reshape(1, 5, 2)
    write_h5(tmp_path / "in" / "s.h5", features()[None], corners, **attributes)
    bag = import_hdf5(tmp_path / "in", tmp_path / "out").read("s")
    assert (bag.meta.tile_px, bag.meta.tile_size_level0, bag.meta.mpp) == (512, 1024.0, 0.5)
    assert bag.meta.encoder_id == "imported:"
    assert np.array_equal(bag.coordinates_level0, corners[0])
    assert np.allclose(bag.features, features(), atol=2e-3)
    told = read_feature_file(tmp_path / "in" / "s.h5", FACTS)
    assert (told.meta.tile_px, told.meta.encoder_id) == (256, "imported:uni")


def test_clam_folders_and_pt_files(tmp_path):
    write_h5(tmp_path / "clam" / "h5_files" / "x.h5", features(seed=1))
    (tmp_path / "clam" / "pt_files").mkdir()
    pt = tmp_path / "clam" / "pt_files" / "x.pt"
    torch.save(torch.from_numpy(features(seed=1)), pt)
    from_h5 = import_hdf5(tmp_path / "clam", tmp_path / "a", FACTS).read("x")
    from_pt = import_hdf5([pt], tmp_path / "b", FACTS).read("x")
    assert np.array_equal(from_h5.features, from_pt.features)
    assert np.array_equal(from_h5.coordinates_level0, from_pt.coordinates_level0)
    alone = tmp_path / "alone" / "y.pt"
    alone.parent.mkdir()
    torch.save(torch.from_numpy(features()).bfloat16(), alone)
    bag = import_hdf5(alone, tmp_path / "c", FACTS).read("y")
    assert np.isnan(bag.coordinates_level0).all()
    torch.save({"features": torch.ones(2, 4), "coords": torch.ones(2, 2), "mpp": 0.25}, alone)
    facts = dataclasses.replace(FACTS, mpp=None)
    bag = import_hdf5(alone.parent, tmp_path / "d", facts).read("y")
    assert (bag.meta.mpp, bag.coordinates_level0.tolist()) == (0.25, [[1, 1], [1, 1]])


def test_every_bad_bag_is_named_and_the_good_ones_are_imported(tmp_path):
    source = tmp_path / "in"
    write_h5(source / "a-good.h5", features())
    write_h5(source / "empty.h5", features(0))
    write_h5(source / "nan.h5", np.full((3, 4), np.nan, np.float32))
    write_h5(source / "wide.h5", features(width=7))
    write_h5(source / "flat.h5", features()[0], np.zeros((1, 2)))
    write_h5(source / "coords.h5", features(), np.zeros((4, 2)))
    write_h5(source / "lacks.h5", None, np.zeros((4, 2)))
    write_h5(source / "stranger.h5", features())
    (source / "junk.h5").write_bytes(b"not HDF5")
    torch.save({"weights": 3}, source / "pickle.pt")
    known = {path.stem for path in source.iterdir()} - {"stranger"}
    with pytest.raises(InputError) as error:
        import_hdf5(source, tmp_path / "out", FACTS, slide_ids=known)
    named = {problem.split(":")[0] for problem in error.value.problems}
    bad = known - {"a-good"} | {"stranger"}
    assert named == {f"bag {name}" for name in bad}
    assert "1 of 10 files were imported" in str(error.value)
    assert "no dataset features; it holds coords" in str(error.value)
    assert "no such slide is known" in str(error.value)
    assert open_bags(tmp_path / "out").slide_ids == ["a-good"]


def test_what_the_files_do_not_say_must_be_given(tmp_path):
    write_h5(tmp_path / "in" / "s.h5", features(), patch_size=256)
    with pytest.raises(InputError) as error:
        import_hdf5(tmp_path / "in", tmp_path / "out")
    assert len(error.value.problems) == 2
    assert "TileFacts(mpp=...)" in str(error.value)


def test_sources_that_are_none_are_said(tmp_path):
    with pytest.raises(InputError, match="no folder of feature files"):
        import_hdf5(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match=r"no \.h5, \.hdf5, \.pt file"):
        import_hdf5(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="no file at"):
        import_hdf5([tmp_path / "x.h5"], tmp_path / "out")
    paths = [write_h5(tmp_path / part / "s.h5", features()) for part in ("one", "two")]
    with pytest.raises(InputError, match="bag s"):
        import_hdf5(paths, tmp_path / "out", FACTS)
