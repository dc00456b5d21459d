"""What one rank computes for `test_ranks.py`; run as `ranks_job.py RANK WORLD STORE OUT`."""

import sys

import numpy as np
import torch
import torch.distributed as dist

from cytoray.perturb.views import CropPolicy, sample_views
from cytoray.ssl.losses import MovingCentre, koleo_loss, sinkhorn_knopp
from cytoray.training import (
    BackboneConfig,
    CropConfig,
    HeadConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    PretrainEngine,
)

STEPS = 3
TILES = 8
CUTS = {1: [0, 8], 2: [0, 3, 8]}  # shares of the tiles that are not equal


def config(**changes) -> PretrainConfig:
    values = {
        "precision": "fp32",
        "backbone": BackboneConfig(kwargs={"depth": 2, "embed_dim": 32, "num_heads": 2}),
        "crops": CropConfig(global_px=64, local_px=32, num_local=2),
        "head": HeadConfig(out_dim=48, hidden_dim=32, bottleneck_dim=16),
        "optim": OptimConfig(lr=0.01, warmup_steps=1, freeze_last_layer_steps=1),
        "batch_size": TILES,
        "total_steps": 10,
    }
    return PretrainConfig(**(values | changes))


def engine_configs() -> dict[str, PretrainConfig]:
    base = config()
    dropping = BackboneConfig(drop_path=0.4, kwargs=dict(base.backbone.kwargs))
    separate = HeadConfig(out_dim=48, hidden_dim=32, bottleneck_dim=16, separate_ibot=True)
    return {
        "dinov2": base,
        "drop_path_separate_head": config(backbone=dropping, head=separate),
        "ibot": config(method="ibot", loss=LossConfig(mask_share=0.1)),
        "dino": config(method="dino"),
        "micro-batches": config(accumulate=2),
        "fsdp": config(sharding="fsdp"),
        "fsdp dinov3": config(
            sharding="fsdp",
            backbone=BackboneConfig(
                # At a LayerScale of 1e-5 rounding errors are all that AdamW sees of a block.
                name="vit_small_patch16_dinov3",
                kwargs=base.backbone.kwargs | {"init_values": 1.0},
            ),
        ),
        "fsdp with all else": config(
            sharding="fsdp",
            accumulate=2,
            pack_crops=True,
            checkpoint_blocks=True,
            backbone=dropping,
            head=separate,
        ),
    }


def global_batch(step: int, tiles: int = TILES, num_local: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    policy = CropPolicy(num_local=num_local)
    views = [sample_views(rng.uniform(0, 80, (5, 2)), 80, policy, rng) for _ in range(tiles)]
    pixels = rng.integers(0, 256, (tiles, 80, 80, 3), dtype=np.uint8)
    return {"pixels": pixels, "views": np.stack(views)}


def share(batch: dict, start: int, stop: int) -> dict:
    whole = len(batch["pixels"])
    own = {name: array[start:stop] for name, array in batch.items()}
    return own | {"offset": start, "global_batch": whole}


def run_engine(settings: PretrainConfig, rank: int, world: int) -> dict:
    engine = PretrainEngine(settings, "cpu", rank=rank, world_size=world)
    start, stop = CUTS[world][rank : rank + 2]
    metrics = [engine.step(share(global_batch(s), start, stop), s) for s in range(STEPS)]
    return {"metrics": metrics, "state": engine.state_dict(), "sharding": engine.sharding}


def run_another_way(rank: int, world: int) -> dict:
    """Two steps one way, then a third from their checkpoint the other way."""
    start, stop = CUTS[world][rank : rank + 2]
    metrics = {}
    for first, second in (("ddp", "fsdp"), ("fsdp", "ddp")):
        engine = PretrainEngine(config(sharding=first), "cpu", rank=rank, world_size=world)
        for step in range(2):
            engine.step(share(global_batch(step), start, stop), step)
        states = [engine.state_dict()]
        if world > 1:
            dist.broadcast_object_list(states, src=0)  # as a file that all ranks read
        other = PretrainEngine(config(sharding=second), "cpu", rank=rank, world_size=world)
        other.load_state_dict(states[0])
        metrics[second] = other.step(share(global_batch(2), start, stop), 2)
    return metrics


def run_losses(rank: int, world: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(TILES, 20, generator=generator) * 2 - 1
    features = torch.randn(TILES, 2, 12, generator=generator)
    start, stop = CUTS[world][rank : rank + 2]
    own = features[start:stop].clone().requires_grad_()
    koleo = koleo_loss(own, global_batch=TILES, offset=start)
    koleo.backward()
    centre = MovingCentre(20)
    return {
        "sinkhorn": sinkhorn_knopp(logits[start:stop], temp=0.05),
        "none_here": sinkhorn_knopp(logits if rank == 0 else logits[:0], temp=0.05),
        "centred": centre(logits[start:stop], temp=0.05),
        "centre": centre.centre,
        "koleo": koleo.detach(),
        "koleo_grad": own.grad,
    }


def run(rank: int, world: int) -> dict:
    engines = {
        name: run_engine(settings, rank, world) for name, settings in engine_configs().items()
    }
    return {
        "losses": run_losses(rank, world),
        "engines": engines,
        "resumed": run_another_way(rank, world),
    }


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
