import subprocess
import sys

import pytest

import cytoray.evaluation
import cytoray.models
import cytoray.report


@pytest.mark.parametrize("package", [cytoray.models, cytoray.evaluation, cytoray.report])
def test_every_public_name_is_found(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("cytoray.distributed.tuner", {"timm", "sklearn", "matplotlib"}),
        ("cytoray.indexing", {"timm", "sklearn", "matplotlib", "torch"}),
    ],
)
def test_a_process_imports_nothing_that_it_may_not_need(module: str, without: set[str]):
    code = f"import sys, {module}; print(sorted({without!r} & {{*sys.modules}}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
