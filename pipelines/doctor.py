"""`cytoray doctor`: what this machine and the cluster have, and what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from cytoray.distributed.cluster import connect
from cytoray.progress import summary_table

PACKAGES = ("ray", "torch", "timm", "pyarrow", "openslide-python", "openslide-bin", "cellpose",
            "mlflow", "peft")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Say what is here.

    Attributes:
        address: a running Ray cluster to look at; default: start one here.
        folder: where runs will be written, for the free space.
    """

    address: str | None = None
    folder: Path = Path(".")


def run(config: Config) -> dict[str, Any]:
    """Print versions, devices, memory, disk and the cluster's resources."""
    import openslide

    connect(config.address)
    resources = ray.cluster_resources()
    memory = psutil.virtual_memory()
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "openslide library": openslide.__library_version__,
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free",
        "shared memory": f"{shared / 2**30:.1f} GiB free (Ray's object store)",
        "disk": f"{shutil.disk_usage(config.folder).free / 2**30:.1f} GiB free in {config.folder}",
        "GPUs here": ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
        or "none",
        "cluster": f"{len(ray.nodes())} node(s), {resources.get('CPU', 0):g} CPU, "
        f"{resources.get('GPU', 0):g} GPU",
    }
    summary_table("doctor", facts)
    return facts


if __name__ == "__main__":
    from pipelines.cli import job_main

    job_main("doctor")
