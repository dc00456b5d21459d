import pytest
import torch

from cytoray.errors import InputError
from cytoray.mil.feature_files import TileFacts, read_feature_file

from .test_hdf5 import FACTS, features, write_h5


def test_attributes_that_are_no_number_are_said(tmp_path):
    path = write_h5(tmp_path / "s.h5", features(), patch_size="big", patch_size_level0=[512], mpp=0)
    with pytest.raises(InputError, match=r"bag s: tile_px is 'big'; give it as TileFacts"):
        read_feature_file(path)
    with pytest.raises(InputError, match="bag s: mpp is"):
        read_feature_file(path, TileFacts(tile_px=256))
    assert read_feature_file(path, TileFacts(tile_px=256, mpp=1.0)).meta.tile_size_level0 == 512


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("loaded",))

    torch.save(Evil(), tmp_path / "s.pt")
    with pytest.raises(InputError, match=r"bag s: .* is no feature file .*not loaded"):
        read_feature_file(tmp_path / "s.pt", FACTS)
