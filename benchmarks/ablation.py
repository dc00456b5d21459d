"""What Nuclei-Centred Perturbation and the SR-Transformer add to DINO (Cyto-SSL, Table 2).

    python -m benchmarks.tile_set --index INDEX --out tiles.npz
    python -m benchmarks.ablation --tiles tiles.npz --cells CELLS --out DIR [--steps 400]
        [--variants dino centred ncp sparse irpe all] [--seeds 0 1 2] [--koleo 0.1]
        [--device cpu|cuda] [--workers 0]

Pretrains one encoder for each variant and seed on unlabelled tiles, then probes it (k nearest
neighbours, logistic regression on standardised features) on labelled cell images split by group;
`random` is the same network untrained, `colour-histogram` no network at all; `centred` has NCP's
crops on nuclei without its shuffled surroundings. All variants have a little KoLeo: in the few
hundred steps that a CPU can make, on small batches, plain DINO (`--koleo 0`) gives all tiles the
same feature before it tells any apart. A finished encoder in DIR is not trained again, so a run
that was stopped goes on. Writes DIR/table.md. The last line is JSON: table, a row for each variant
and probe with the mean accuracy over the seeds and its 95 % t-interval, the same of the differences
to `random` and `dino` seed by seed, and each seed's value with a bootstrap interval over groups.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.tile_set import TileSet, batches, load_tiles
from cytoray.evaluation.baselines import load_features_model
from cytoray.evaluation.bootstrap import bootstrap_ci
from cytoray.evaluation.protocol import Examples, probe_examples
from cytoray.finetune.cells import Cells, Columns, read_cells, split_cells
from cytoray.finetune.pixels import read_image
from cytoray.io import atomic_write_text
from cytoray.models.encoder import SPEC_FILE, save_encoder
from cytoray.models.sr_transformer import SRConfig
from cytoray.perturb import CROP_POLICIES, PerturbConfig
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    HeadConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    PretrainEngine,
)
from cytoray.training.config import encoder_spec

PLAIN, NCP = PerturbConfig(enabled=False), PerturbConfig()
# variant -> perturbation, sparse attention, relative positions
VARIANTS = {
    "dino": (PLAIN, False, False),
    "centred": (PerturbConfig(shuffle=False), False, False),
    "ncp": (NCP, False, False),
    "sparse": (PLAIN, True, False),
    "irpe": (PLAIN, False, True),
    "all": (NCP, True, True),
}
PROBES = ("linear", "knn")
BASES = ("random", "dino")


def config_of(args: argparse.Namespace, variant: str, seed: int) -> PretrainConfig:
    """The run of a variant; all variants share everything but the three switches."""
    _, sparse, irpe = VARIANTS[variant]
    return PretrainConfig(
        method=args.method,
        backbone=BackboneConfig(name=args.backbone, sr=SRConfig(sparse=sparse, irpe=irpe)),
        crops=CropConfig(
            global_px=args.global_px, local_px=args.local_px, num_global=2, num_local=args.locals
        ),
        head=HeadConfig(out_dim=args.out_dim, hidden_dim=1024, bottleneck_dim=128),
        loss=LossConfig(centering="centering", teacher_temp=0.04, koleo_weight=args.koleo),
        optim=OptimConfig(
            lr=args.lr * (1024 / args.batch) ** 0.5,  # `--lr` is the peak
            warmup_steps=args.steps // 10,
            weight_decay_end=0.04,
            layer_decay=1.0,
            patch_embed_lr_mult=1.0,
            freeze_last_layer_steps=args.steps // 20,
            ema=args.ema,
        ),
        batch_size=args.batch,
        total_steps=args.steps,
        seed=seed,
    )


def pretrain(args: argparse.Namespace, tiles: TileSet, variant: str, seed: int) -> Path:
    """Train one encoder, or find it trained; returns its folder."""
    folder = args.out / f"{variant}-{seed}" / "encoder"
    if (folder / SPEC_FILE).is_file():
        return folder
    config = config_of(args, variant, seed)
    policy = replace(CROP_POLICIES[args.method], num_global=2, num_local=args.locals)
    engine = PretrainEngine(config, args.device)
    stream = batches(
        tiles, policy, VARIANTS[variant][0],
        batch=args.batch, steps=args.steps, seed=seed, workers=args.workers,
    )  # fmt: skip
    began = time.perf_counter()
    for step, batch in enumerate(stream):
        metrics = engine.step(batch, step)
        if step % args.log_every == 0 or step == args.steps - 1:
            rate = (step + 1) * args.batch / (time.perf_counter() - began)
            shown = ", ".join(
                f"{name} {float(metrics[name]):.3f}"
                for name in ("loss", "feature_std", "effective_rank", "teacher_entropy")
                if name in metrics
            )
            print(f"{variant}-{seed} step {step}: {shown}, {rate:.1f} tiles/s", flush=True)
    return save_encoder(folder, engine.encoder_state_dict(), encoder_spec(config, mpp=tiles.mpp))


@torch.inference_mode()
def features_of(source: str, cells: Cells, device: str, pretrained: bool = True) -> np.ndarray:
    """Features of all cell images: float32 (N, D)."""
    model = load_features_model(source, pretrained)
    model = model.to(device)
    side = model.spec.img_px
    parts = []
    for start in range(0, len(cells), 64):
        images = np.stack([read_image(p, side) for p in cells.paths[start : start + 64]])
        parts.append(model(torch.from_numpy(images).to(device)).float().cpu().numpy())
    return np.concatenate(parts)


def probed(features: np.ndarray, cells: Cells, seed: int) -> dict[str, tuple[float, float, float]]:
    """Accuracy of each probe on the test part of the split of `seed`: (value, low, high)."""
    split = split_cells(cells, seed=seed)
    examples = Examples(
        names=cells.names, labels=cells.labels, classes=cells.classes, groups=cells.groups,
        split=split,
    )  # fmt: skip
    made = {}
    for name in PROBES:
        answers, _ = probe_examples(name, features, examples, seed=seed)
        low, high, point = bootstrap_ci(*examples.test()[:1], answers, examples.test()[1],
                                        "accuracy", 1000, seed)  # fmt: skip
        made[name] = (point, low, high)
    return made


def mean_interval(values: Sequence[float]) -> list[float]:
    """Mean with its 95 % t-interval; of one value there is no interval."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return [round(mean, 4)]
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return [round(mean, 4), round(mean - half, 4), round(mean + half, 4)]


def rows_of(name: str, seeds: list[dict[str, tuple[float, float, float]]]) -> list[dict[str, Any]]:
    """Table rows of a variant, one a probe."""
    return [
        {
            "variant": name,
            "probe": probe,
            "accuracy": mean_interval([seed[probe][0] for seed in seeds]),
            "seeds": [[round(v, 4) for v in seed[probe]] for seed in seeds],
        }
        for probe in PROBES
    ]


def add_gains(rows: list[dict[str, Any]]) -> None:
    """Differences to other rows on the same split, seed by seed: splits differ more than encoders.

    Adds `over_<name>` of `BASES` to each row: the mean difference and its interval.
    """
    accuracies = {
        (row["variant"], row["probe"]): np.array([seed[0] for seed in row["seeds"]]) for row in rows
    }
    for row in rows:
        own = accuracies[row["variant"], row["probe"]]
        for base in BASES:
            other = accuracies.get((base, row["probe"]))
            if other is not None and base != row["variant"]:
                row[f"over_{base}"] = mean_interval((own - other).tolist())


def table_text(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    titles = ["encoder", "probe", "accuracy (95 % CI over seeds)"]
    titles += [f"over {base}" for base in BASES] + ["seeds (95 % CI over sources)"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["variant"], row["probe"], _with_interval(row["accuracy"], "")]
        cells += [_with_interval(row.get(f"over_{base}", []), "+") for base in BASES]
        cells.append(
            ", ".join(f"{v:.3f} ({low:.3f} to {high:.3f})" for v, low, high in row["seeds"])
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _with_interval(values: Sequence[float], sign: str) -> str:
    mean, *ends = [f"{value:{sign}.3f}" for value in values] or ["-"]
    return f"{mean} ({ends[0]} to {ends[1]})" if ends else mean


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description="Cyto-SSL's ablation on your own tiles and cells.")
    parser.add_argument("--tiles", type=Path, required=True, help="made by benchmarks.tile_set")
    parser.add_argument("--cells", type=Path, required=True, help="folder per class, or CSV")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--method", default="dino")
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--koleo", type=float, default=0.1, help="weight of KoLeo; 0: plain DINO")
    parser.add_argument("--out-dim", type=int, default=1024)
    parser.add_argument("--global-px", type=int, default=112)
    parser.add_argument("--local-px", type=int, default=48)
    parser.add_argument("--locals", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--group", default="source_image", help="column of the CSV to split by")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Train what is missing, probe everything, print the table and a line of JSON."""
    args = parse()
    tiles = load_tiles(args.tiles)
    cells = read_cells(args.cells, Columns(group=args.group if args.cells.is_file() else ""))
    began = time.perf_counter()
    histogram = features_of("colour-histogram", cells, "cpu")
    rows = rows_of("colour-histogram", [probed(histogram, cells, s) for s in args.seeds])
    untrained = []
    for seed in args.seeds:
        config = config_of(args, "dino", seed)
        engine = PretrainEngine(config, "cpu")
        folder = args.out / f"random-{seed}" / "encoder"
        save_encoder(folder, engine.encoder_state_dict(), encoder_spec(config, mpp=tiles.mpp))
        untrained.append(probed(features_of(str(folder), cells, args.device), cells, seed))
    rows += rows_of("random", untrained)
    made: dict[str, list[Any]] = {variant: [] for variant in args.variants}
    for seed in args.seeds:
        for variant in args.variants:
            folder = pretrain(args, tiles, variant, seed)
            made[variant].append(probed(features_of(str(folder), cells, args.device), cells, seed))
            print(f"{variant}-{seed}: {made[variant][-1]}", flush=True)
    for variant, seeds in made.items():
        rows += rows_of(variant, seeds)
    add_gains(rows)
    text = table_text(rows)
    atomic_write_text(args.out / "table.md", text)
    print(text)
    facts = {"steps": args.steps, "batch": args.batch, "tiles": len(tiles), "device": args.device}
    facts |= {"seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps(facts | {"table": rows}))


if __name__ == "__main__":
    main()
