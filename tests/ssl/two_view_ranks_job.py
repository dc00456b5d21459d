"""What one rank computes for `test_two_view_ranks.py`; run as `... RANK WORLD STORE OUT`."""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from cytoray.ssl.batch_norm import GlobalBatchNorm
from cytoray.ssl.losses import nt_xent_loss
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    OptimConfig,
    PretrainConfig,
    PretrainEngine,
    SRConfig,
    TwoViewConfig,
)

STEPS, TILES = 3, 8
CUTS = {1: [0, 8], 2: [0, 3, 8]}  # shares of the tiles that are not equal
TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def configs() -> dict[str, PretrainConfig]:
    small = TwoViewConfig(hidden_dim=24, out_dim=12)
    queue = TwoViewConfig(hidden_dim=24, out_dim=12, queue_size=20)
    chosen = {"simclr": small, "moco": small, "byol": small, "moco queue": queue}
    chosen |= {"moco parts": small}
    sr = SRConfig(sparse=True, irpe=True, top_h=3)
    made = {
        name: PretrainConfig(
            method=name.split()[0],
            precision="fp32",
            two_views=two_views,
            backbone=BackboneConfig(
                kwargs=dict(TINY),
                drop_path=0.3 if name == "simclr" else 0.0,
                sr=sr if name == "moco queue" else SRConfig(),
            ),
            crops=CropConfig(global_px=32, num_local=0),
            optim=OptimConfig(lr=0.01, warmup_steps=1),
            accumulate=2 if name == "moco parts" else 1,
            batch_size=TILES,
            total_steps=10,
        )
        for name, two_views in chosen.items()
    }
    resnet = replace(made["byol"], backbone=BackboneConfig(name="resnet10t"))
    return made | {"byol resnet": resnet}


def run_engine(config: PretrainConfig, rank: int, world: int) -> dict:
    engine = PretrainEngine(config, "cpu", rank=rank, world_size=world)
    for group in engine.optimizer.param_groups:
        # With AdamW's own 1e-8 a gradient that is all rounding error moves a weight as far as any.
        group["eps"] = 1e-3
    start, stop = CUTS[world][rank : rank + 2]
    metrics = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        crops = torch.randn(TILES, 2, 3, 32, 32, generator=generator)
        batch = {"global_crops": crops[start:stop], "global_batch": TILES, "offset": start}
        metrics.append(engine.step(batch, step))
    return {"metrics": metrics, "model": engine.method.state_dict()}


def run_parts(rank: int, world: int) -> dict:
    """NT-Xent behind batch norm, on this rank's rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(TILES, 2, 6, generator=generator) * 2 + 5
    start, stop = CUTS[world][rank : rank + 2]
    own = rows[start:stop].clone().requires_grad_()
    norm = GlobalBatchNorm(6)
    with torch.no_grad():
        norm.bias.normal_(generator=generator)
    normed = norm(own.flatten(0, 1)).unflatten(0, own.shape[:2])
    loss = nt_xent_loss(normed, temperature=0.2, global_batch=TILES, offset=start)
    loss.backward()
    return {
        "loss": loss.detach(),
        "normed": normed.detach(),
        "grad": own.grad,
        "grad_weight": norm.weight.grad,
    }


def run(rank: int, world: int) -> dict:
    engines = {name: run_engine(config, rank, world) for name, config in configs().items()}
    return {"parts": run_parts(rank, world), "engines": engines}


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world
    )
    torch.save(run(rank, world), sys.argv[4])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
