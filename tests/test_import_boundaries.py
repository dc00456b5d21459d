"""Arrows go one way: pipelines -> distributed -> everything else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where a library may be imported; every other folder of the project must do without it.
ALLOWED = {
    "ray": ("cytoray/distributed/", "pipelines/"),
    "mlflow": ("cytoray/tracking/",),
    "cytoray.distributed": ("cytoray/distributed/", "pipelines/"),
    "pipelines": ("pipelines/",),
    "benchmarks": ("benchmarks/",),
    "tests": ("tests/",),
}
# Pixels and centroids are numpy in, numpy out; models and losses know neither slides nor files.
WITHOUT = {
    "cytoray/slides/": ("torch", "timm"),
    "cytoray/perturb/": ("torch", "timm"),
    "cytoray/ssl/": ("cytoray.slides", "openslide", "pyarrow"),
    "cytoray/models/": ("cytoray.slides", "openslide", "pyarrow"),
    "cytoray/training/": ("cytoray.slides", "openslide", "pyarrow"),
}
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("cytoray", "pipelines")
    for path in (ROOT / folder).rglob("*.py")
)


def imported(source: str, module: str) -> set[str]:
    """Dotted names a module imports, anywhere in it, relative ones resolved."""
    package = module.removesuffix("/__init__.py").removesuffix(".py").split("/")
    if not module.endswith("__init__.py"):
        package = package[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            names |= {first.value} if isinstance(first, ast.Constant) else set()
    return names


def uses(names: set[str], library: str) -> bool:
    return any(name == library or name.startswith(f"{library}.") for name in names)


def faults(source: str, module: str) -> list[str]:
    """Libraries a module imports and must not."""
    names = imported(source, module)
    found = [
        library
        for library, places in ALLOWED.items()
        if uses(names, library) and not module.startswith(places)
    ]
    for folder, libraries in WITHOUT.items():
        if module.startswith(folder):
            found += [library for library in libraries if uses(names, library)]
    return found


def test_the_project_is_looked_at() -> None:
    assert len(MODULES) > 60
    assert "cytoray/distributed/pretrain.py" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_what_its_place_allows(module: str) -> None:
    assert faults((ROOT / module).read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source", "library"),
    [
        ("cytoray/slides/reader.py", "import ray.data", "ray"),
        ("cytoray/ssl/dino.py", "def f():\n    from ray import train", "ray"),
        ("cytoray/distributed/index.py", "from mlflow import MlflowClient", "mlflow"),
        ("cytoray/mil/train.py", "from cytoray import distributed", "cytoray.distributed"),
        ("cytoray/mil/train.py", "from ..distributed.index import f", "cytoray.distributed"),
        ("cytoray/__init__.py", "from .distributed import index", "cytoray.distributed"),
        ("cytoray/tracking/a.py", "import importlib\nimportlib.import_module('ray')", "ray"),
        ("cytoray/distributed/index.py", "import pipelines.index", "pipelines"),
        ("cytoray/perturb/views.py", "import torch", "torch"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str, library: str) -> None:
    assert faults(source, module) == [library]
    assert faults("import rayleigh\nimport cytoray.slides_x", module) == []
