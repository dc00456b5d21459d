"""What the tests share: a few generated slides, one Ray cluster, and jobs run once on both.

The jobs are real and small: every fixture below the cluster runs a job of `pipelines` as its
command would, once for the whole session.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

# Read by Ray when it is imported and inherited by the processes it starts.
os.environ.update(
    RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_DATA_DISABLE_PROGRESS_BARS="1"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)
# Read by Triton when it is imported: without a GPU its kernels are interpreted.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from cytoray.streaming.plan import ReadPlan
    from cytoray.training import PretrainConfig

TILE_PX = 64
MPP = 0.5
TINY_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2}


def tiny_ssl(**changes: Any) -> PretrainConfig:
    """A DINOv2 run of twelve steps whose every size is small."""
    from cytoray.training import BackboneConfig, CropConfig, HeadConfig, OptimConfig, PretrainConfig

    values = {
        "precision": "fp32",
        "backbone": BackboneConfig(name="vit_tiny_patch16_224", kwargs=TINY_VIT),
        "crops": CropConfig(global_px=32, local_px=16, num_local=2),
        "head": HeadConfig(out_dim=64, hidden_dim=64, bottleneck_dim=32),
        "optim": OptimConfig(warmup_steps=2, freeze_last_layer_steps=2),
        "batch_size": 8,
        "total_steps": 12,
    }
    return PretrainConfig(**(values | changes))


@dataclass(frozen=True)
class Job:
    """A finished job: its run folder and what `run` returned."""

    out: Path
    summary: dict[str, Any]


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight slides of 1024 px at 0.5 um/px, one a patient, two of them in split `test`."""
    from cytoray.synthetic import SynthConfig, synthesize

    config = SynthConfig(
        num_slides=8, held_out=2, size_px=1024, mpp=MPP, slides_per_patient=(1, 1), seed=3
    )
    return synthesize(config, tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="session")
def plain_index(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the slides indexed in this process, without Ray: the parts alone."""
    from cytoray.indexing import IndexSettings, SlideIndexer
    from cytoray.slides import Grid, read_manifest

    out = tmp_path_factory.mktemp("plain-index")
    indexer = SlideIndexer(IndexSettings(grid=Grid(tile_px=TILE_PX, mpp=MPP)), out)
    for entry in read_manifest(manifest).rows.slice(0, 3).to_pylist():
        assert indexer(entry).ok
    return out


@pytest.fixture(scope="session")
def read_plan(manifest: Path, plain_index: Path) -> ReadPlan:
    """What to read of the three slides of `plain_index`."""
    from cytoray.indexing import part_path, read_indexed
    from cytoray.slides import read_manifest, slide_schema
    from cytoray.streaming.plan import make_plan

    checked = read_manifest(manifest)
    schema = slide_schema(checked.rows.schema, checked.label_columns)
    ids = checked.rows.slice(0, 3).column("slide_id").to_pylist()
    indexed: list[Any] = [read_indexed(part_path(plain_index, slide_id)) for slide_id in ids]
    rows = [{name: slide.row.get(name) for name in schema.names} for slide in indexed]
    return make_plan(pa.Table.from_pylist(rows, schema), tile_px=TILE_PX, mpp=MPP)


@pytest.fixture(scope="session")
def nuclei_dir(plain_index: Path) -> str:
    """The nuclei parts of `read_plan`."""
    return str(plain_index / "nuclei")


@pytest.fixture(scope="session")
def plan_tile_ids(read_plan: ReadPlan, plain_index: Path) -> list[str]:
    """Every tile of `read_plan`, sorted; worked out from the slides' masks alone."""
    from cytoray.indexing import part_path, read_indexed

    names = []
    ids = read_plan.slides.column("slide_id").to_pylist()
    slides: list[Any] = [read_indexed(part_path(plain_index, slide_id)) for slide_id in ids]
    for row in (slide.row for slide in slides):
        columns = row["chunk_columns"]
        for chunk, mask in enumerate(row["keep_masks"]):
            place = f"{chunk % columns}_{chunk // columns}"
            chunk_name = f"{row['slide_id']}:{MPP:g}:{TILE_PX}:{place}"
            names += [f"{chunk_name}:{i}" for i in range(64) if mask >> i & 1]
    return sorted(names)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for the session: four logical CPUs, in a folder of its own."""
    import ray

    folder = tempfile.mkdtemp(prefix="cr")  # short: names of Unix sockets end at 107 bytes
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=300_000_000,
        namespace="cytoray",
        logging_level=logging.ERROR,
        log_to_driver=False,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store of the session's jobs."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="session")
def indexed(ray_cluster: None, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """`cytoray index` of the generated slides."""
    from pipelines import index

    out = tmp_path_factory.mktemp("index") / "index"
    config = index.Config(manifest=manifest, out=out, tile_px=TILE_PX, mpp=MPP)
    return Job(out, index.run(config))


@pytest.fixture(scope="session")
def pretrained(
    indexed: Job,
    tracking_uri: str,
    labelled_cells: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    """`cytoray pretrain`, twelve steps with one worker, probed on cells."""
    from pipelines import pretrain

    out = tmp_path_factory.mktemp("pretrain") / "run"
    config = pretrain.Config(
        index=indexed.out,
        out=out,
        ssl=tiny_ssl(),
        shuffle_chunks=4,
        checkpoint_every=5,
        log_every=1,
        log_tiles=True,
        probe_cells=labelled_cells,
        probe_every=5,
        tracking_uri=tracking_uri,
    )
    return Job(out, pretrain.run(config))


@pytest.fixture(scope="session")
def embedded(indexed: Job, pretrained: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """`cytoray embed` with the pretrained encoder."""
    from pipelines import embed

    out = tmp_path_factory.mktemp("embed") / "run"
    config = embed.Config(index=indexed.out, encoder=pretrained.summary["encoder"], out=out)
    return Job(out, embed.run(config))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def labelled_cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 90 small cells of three classes, three cells to a group: colour tells the class."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("cells")
    rng = np.random.default_rng(0)
    lines = ["image,label,source_image"]
    for name, colour in (
        ("big", (120, 60, 160)),
        ("pale", (200, 160, 190)),
        ("red", (200, 70, 60)),
    ):
        (folder / name).mkdir()
        for index in range(30):
            pixels = np.full((40, 48, 3), 235.0)
            y, x = np.ogrid[:40, :48]
            inside = (y - 20) ** 2 + (x - 24) ** 2 < rng.integers(80, 260)
            pixels[inside] = colour
            pixels += rng.normal(0, 12, pixels.shape)
            path = f"{name}/{index // 3:02d}_{index % 3}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / path)
            lines.append(f"{path},{name},{name}/{index // 3:02d}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder folder: a ViT of two blocks on 32 px images, random weights."""
    import timm
    import torch

    from cytoray.models import EncoderSpec, save_encoder

    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs).state_dict()
    spec = EncoderSpec(
        architecture="vit_tiny_patch16_224",
        img_px=32,
        mean=(0.7, 0.6, 0.7),
        std=(0.2, 0.2, 0.2),
        patch_px=8,
        embed_dim=24,
        kwargs=kwargs,
    )
    return save_encoder(tmp_path_factory.mktemp("tiny") / "encoder", weights, spec)
