"""Features of every kept tile: CPU actors read, encoder actors embed, a bag a slide is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from cytoray.distributed.cluster import Shared
from cytoray.distributed.stage_meter import (
    EMBED,
    EMBED_STAGES,
    ENCODERS,
    Reporter,
    StageWatch,
    stage_meter,
)
from cytoray.distributed.tile_source import (
    ReadChunks,
    chunk_dataset,
    pack_chunk,
    unpack_chunk,
)
from cytoray.errors import InputError, reason_code
from cytoray.mil import Bag, BagMeta, open_bags, write_bag
from cytoray.models.encoder import Encoder, load_encoder
from cytoray.patience import GIVEN_UP, ReadTries
from cytoray.progress import Progress
from cytoray.slides import quarantine_row
from cytoray.streaming.plan import ReadPlan


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """Which encoder embeds.

    Attributes:
        source: a folder written by `pretrain`, or a timm name.
        pretrained: for a timm name: published weights, else random ones.
    """

    source: str
    pretrained: bool = True

    def load(self, device: str = "cpu") -> Encoder:
        """Load it.

        Raises:
            InputError: no such encoder; near names are listed.
        """
        return load_encoder(self.source, pretrained=self.pretrained, device=device)


class EmbedChunks:
    """Ray Data stage: tiles -> features float16 (n, D); pixels end here."""

    def __init__(self, choice: EncoderChoice, use_gpu: bool, threads: int, meter: str) -> None:
        self.device = "cuda" if use_gpu else "cpu"
        if not use_gpu:
            torch.set_num_threads(threads)
        self.encoder = choice.load(self.device)
        self.reporter = Reporter(meter, ENCODERS)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for i in range(table.num_rows):
            self.reporter.switch(EMBED)
            columns = unpack_chunk(table.slice(i, 1))
            pixels = columns.pop("pixels")
            packed = pack_chunk(columns | {"features": self.embed(pixels)})
            self.reporter.switch("")
            self.reporter.add(EMBED, done=len(pixels))
            yield packed

    @torch.inference_mode()
    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, S, S, 3) -> float16 (n, D)."""
        images = torch.from_numpy(pixels.copy()).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            features = self.encoder(images)
        return features.float().cpu().numpy().astype(np.float16)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What one call of `embed_slides` did.

    Attributes:
        tried: slides without a bag before it.
        num_written: bags it wrote.
        quarantine: rows of tiles and slides it could not read.
    """

    tried: list[str]
    num_written: int = 0
    quarantine: list[dict[str, Any]] = field(default_factory=list)


def embed_slides(
    plan: ReadPlan,
    choice: EncoderChoice,
    bags: Path,
    *,
    progress: Progress,
    use_gpu: bool,
    num_encoders: int,
    tries: ReadTries | None = None,
) -> Embedded:
    """Write a bag for every slide of the plan; a slide that has one of this encoder is passed over.

    Args:
        plan: what to read.
        choice: the encoder.
        bags: folder of the bags.
        progress: shown while it runs.
        use_gpu: one GPU for each encoder actor.
        num_encoders: encoder actors.
        tries: when a slide that hangs or crashes its reader is given up.
    """
    encoder = choice.load()
    encoder_id = encoder.encoder_id
    wanted = _slides_to_do(plan, bags, encoder_id)
    total = plan.slides.num_rows
    progress.update("slides", total - len(wanted), total, "slides")
    if not wanted:
        return Embedded(tried=[])
    writer = _BagWriter(plan, bags, encoder_id, choice.source)
    chunks = np.concatenate(
        [np.arange(plan.first_chunk[s], plan.first_chunk[s + 1]) for s in wanted]
    )
    done = total - len(wanted)
    tiles = 0
    with stage_meter() as meter, StageWatch(meter, EMBED_STAGES, progress):
        for columns in _stream(plan, chunks, choice, use_gpu, num_encoders, meter, tries):
            tiles += len(columns["tile_id"])
            done += writer.add(columns)
            progress.update("tiles", tiles, int(_tiles(plan, chunks)), "tiles")
            progress.update("slides", done, total, "slides")
    done += writer.finish()
    progress.update("slides", done, total, "slides")
    ids = plan.slides.column("slide_id").to_pylist()
    return Embedded(
        tried=[ids[slide] for slide in wanted],
        num_written=writer.written,
        quarantine=writer.quarantine,
    )


def _tiles(plan: ReadPlan, chunks: np.ndarray) -> int:
    return int(np.bitwise_count(plan.keep_mask[chunks]).sum())


def _slides_to_do(plan: ReadPlan, bags: Path, encoder_id: str) -> list[int]:
    """Slide rows without a bag of this encoder and grid.

    Raises:
        InputError: the folder holds bags of another encoder or grid.
    """
    have: set[str] = set()
    if bags.is_dir() and any(bags.glob("slide_id=*/bag.parquet")):
        store = open_bags(bags)
        meta = store.info(store.slide_ids[0]).meta
        now = (encoder_id, plan.tile_px, plan.mpp)
        if (meta.encoder_id, meta.tile_px, meta.mpp) != now:
            raise InputError(
                f"{bags} holds bags of encoder {meta.encoder_id} with {meta.tile_px} px tiles at "
                f"{meta.mpp:g} um/px, this run makes {now[0]}, {now[1]} px, {now[2]:g}; choose "
                "another --out"
            )
        have = set(store.slide_ids)
    ids = plan.slides.column("slide_id").to_pylist()
    return [i for i, slide_id in enumerate(ids) if slide_id not in have]


def _stream(
    plan: ReadPlan,
    chunks: np.ndarray,
    choice: EncoderChoice,
    use_gpu: bool,
    num_encoders: int,
    meter: str,
    tries: ReadTries | None,
) -> Iterator[dict[str, np.ndarray]]:
    cpus = ray.cluster_resources().get("CPU", 1.0)
    encoder_cpus = 1.0 if use_gpu else max(0.5, (cpus - 0.6) / num_encoders)
    rest = cpus - 0.1 - num_encoders * encoder_cpus
    reader_cpus = 1.0 if rest >= 2 else 0.4
    readers = max(1, int(rest / reader_cpus + 1e-6))
    shared = Shared(replace(plan, chunk_numbers=chunks))
    dataset = chunk_dataset(
        ReadChunks,
        (shared, meter, tries),
        start=0,
        stop=len(chunks),
        cpus_per_reader=reader_cpus,
        max_readers=readers,
    ).map_batches(
        EmbedChunks,  # type: ignore[arg-type]
        fn_constructor_args=(choice, use_gpu, max(1, round(encoder_cpus)), meter),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=encoder_cpus,
        num_gpus=1 if use_gpu else None,
        compute=ray.data.ActorPoolStrategy(size=num_encoders),
    )
    tables: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    for table in tables:
        for i in range(table.num_rows):
            yield unpack_chunk(table.slice(i, 1))


class _BagWriter:
    """Collects the chunks of one slide after another and writes each bag when it is whole."""

    def __init__(self, plan: ReadPlan, bags: Path, encoder_id: str, encoder_name: str) -> None:
        self.plan, self.bags = plan, bags
        self.encoder_id, self.encoder_name = encoder_id, encoder_name
        self.written = 0
        self.quarantine: list[dict[str, Any]] = []
        self._slide = -1
        self._parts: list[dict[str, np.ndarray]] = []

    def add(self, columns: dict[str, np.ndarray]) -> int:
        """Take a chunk (they come in slide order); returns slides finished by this call."""
        slide = int(columns["slide"][0])
        finished = 0
        if slide != self._slide and self._slide >= 0:
            finished = self._write()
        self._slide = slide
        self._parts.append(columns)
        return finished

    def finish(self) -> int:
        """Write the last slide."""
        return self._write() if self._slide >= 0 else 0

    def _write(self) -> int:
        columns = {k: np.concatenate([p[k] for p in self._parts]) for k in self._parts[0]}
        self._parts = []
        row = {
            name: self.plan.slides.column(name)[self._slide].as_py()
            for name in ("slide_id", "path", "mpp_x")
        }
        errors = columns["error"]
        good = errors == ""
        given_up = [e for e in np.unique(errors).tolist() if reason_code(e) in GIVEN_UP]
        if given_up or not good.any():
            why = given_up[0] if given_up else f"not one tile could be read: {errors[0]}"
            self._refuse(row, "", f"no bag: {why}")
            return 0
        for i in np.flatnonzero(~good):
            self._refuse(row, str(columns["tile_id"][i]), str(errors[i]))
        meta = BagMeta(
            slide_id=row["slide_id"],
            tile_px=self.plan.tile_px,
            mpp=self.plan.mpp,
            tile_size_level0=self.plan.tile_px * self.plan.mpp / row["mpp_x"],
            encoder_id=self.encoder_id,
            encoder_name=self.encoder_name,
        )
        ids = tuple(columns["tile_id"][good].tolist())
        corner = columns["corner_level0"][good]
        write_bag(self.bags, Bag(columns["features"][good], corner, meta, ids))
        self.written += 1
        return 1

    def _refuse(self, row: dict[str, Any], region: str, message: str) -> None:
        self.quarantine.append(
            quarantine_row(
                row["slide_id"], row["path"], "embed", reason_code(message), message, region=region
            )
        )
