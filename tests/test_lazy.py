import subprocess
import sys

import pytest

import cytoray.evaluation
import cytoray.models


@pytest.mark.parametrize("package", [cytoray.models, cytoray.evaluation])
def test_every_public_name_is_found(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_a_process_that_trains_heads_imports_neither_timm_nor_scikit_learn():
    code = (
        "import sys, cytoray.distributed.tuner; print(sorted({'timm', 'sklearn'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
