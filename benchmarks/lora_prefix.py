"""A LoRA trial that reads the output of the frozen blocks against one that computes it anew.

    python -m benchmarks.lora_prefix [--adapted 0 4 1] [--tiles 12] [--rounds 2]

Both train the same aggregator and adapters on the same tiles, in turns; tiles are random pixels
in memory, so reading slides, which is saved as well, is left out. `first_trial` counts
the time of computing the output as well. The last line is one JSON object.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro

from cytoray.mil import ArrayTileSource, MILConfig, train_lora
from cytoray.mil.prefix import FrozenPrefix, compute_prefix
from cytoray.models.encoder import load_encoder
from cytoray.models.prefix import frozen_blocks


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured.

    Attributes:
        encoder: architecture, with random weights.
        adapted: blocks that are adapted, one measurement each; 0: all.
        slides: slides, half of them to validate on.
        tiles: tiles of a slide.
        epochs: of a trial.
        rounds: of all measurements; the best time counts.
        threads: of torch.
    """

    encoder: str = "vit_tiny_patch16_224"
    adapted: tuple[int, ...] = (0, 4, 1)
    slides: int = 4
    tiles: int = 12
    epochs: int = 2
    rounds: int = 2
    threads: int = 2


def main(config: Config) -> dict[str, float]:
    """Measure, print, and return what the last line says."""
    torch.set_num_threads(config.threads)
    encoder = load_encoder(f"random:{config.encoder}")
    rng = np.random.default_rng(0)
    side = encoder.spec.img_px
    size = (config.tiles, side, side, 3)
    tiles = {f"s{i}": rng.integers(0, 256, size, dtype=np.uint8) for i in range(config.slides)}
    source, ids = ArrayTileSource(tiles), list(tiles)
    labels = [i % 2 for i in range(config.slides)]
    half = config.slides // 2
    parts = (ids[:half], labels[:half], ids[half:], labels[half:], 2)
    base = MILConfig(lora_rank=4, epochs=config.epochs, patience=0, warm_start_epochs=0,
                     batch_bags=2, tiles_per_bag=config.tiles, augment=False)  # fmt: skip
    found: dict[str, float] = {}
    for adapted in config.adapted:
        trial = replace(base, lora_blocks=adapted)
        depth, every = frozen_blocks(encoder, adapted), np.arange(config.tiles)
        plain, shared, compute = [], [], []
        for _ in range(config.rounds):
            began = time.perf_counter()
            arrays = {name: compute_prefix(encoder, source, name, every, depth) for name in ids}
            compute.append(time.perf_counter() - began)
            held = dict.fromkeys(ids, every)
            prefix = FrozenPrefix(depth, held, arrays.__getitem__)  # type: ignore[arg-type]
            for times, given in ((plain, None), (shared, prefix)):
                began = time.perf_counter()
                train_lora(trial, encoder, source, *parts, prefix=given)
                times.append(time.perf_counter() - began)
        key = f"adapted_{adapted or 'all'}"
        found[f"{key}_trial"] = round(min(plain) / min(shared), 3)
        found[f"{key}_first_trial"] = round(min(plain) / (min(shared) + min(compute)), 3)
        mb = sum(a.nbytes for a in arrays.values() if a is not None) / 1e6
        print(f"{depth} frozen blocks: {min(plain):.2f} s anew, {min(shared):.2f} s shared, "
              f"computed once in {min(compute):.2f} s, {mb:.0f} MB")  # fmt: skip
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main(tyro.cli(Config))
