"""Train the `small` detector on painted scenes and generated slides, and on images of one's own.

    python -m cytoray.nuclei.train_small --out small.safetensors
    python -m cytoray.nuclei.train_small --out mine.safetensors --images DIR --masks DIR --mpp 0.5

A mask has the stem of its image and is bright (above 127) in nuclei. `--hold-out` names a file
with one stem a line: these images are scored at the end and never trained on. A record of the
configuration, the held-out stems and the figures is written beside the weights, as `.json`. Those
of the package have theirs in `weights/small.json`; besides painted scenes and generated slides
they saw 44 of 77 labelled liquid-based cervical fields (CC BY 4.0), split by original field.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cytoray.errors import InputError, raise_problems
from cytoray.io import atomic_write_text
from cytoray.nuclei.score import pool_scores, score_detections
from cytoray.nuclei.small import MULTIPLE_PX, SmallConfig, SmallDetector
from cytoray.nuclei.small_data import (
    Batch,
    CropSource,
    LabelledImage,
    generated_images,
    painted_images,
    read_folder,
)
from cytoray.nuclei.small_net import SmallNet, save_net

_HELD_OUT_SEED = 1_000_003  # of scenes and slides that no training seed gives
_LOG_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimiser steps.
        batch: crops a step.
        crop_px: side of a crop, in working pixels.
        slides: generated slides the crops are cut from.
        slide_share: share of the crops cut from them.
        image_share: share of the crops cut from the user's images, if there are any.
        learning_rate: the highest, of AdamW; warmed up, then along a cosine to zero.
        weight_decay: of AdamW.
        seed: of the data and the initial weights.
    """

    steps: int = 1300
    batch: int = 16
    crop_px: int = 128
    slides: int = 24
    slide_share: float = 0.2
    image_share: float = 0.2
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        checks = [
            (self.steps >= 1, "steps must be at least 1"),
            (self.batch >= 1, "batch must be at least 1"),
            (
                self.crop_px >= 32 and self.crop_px % MULTIPLE_PX == 0,
                f"crop_px must be a multiple of {MULTIPLE_PX}, at least 32",
            ),
            (self.slides >= 1, "slides must be at least 1"),
            (
                min(self.slide_share, self.image_share) >= 0
                and self.slide_share + self.image_share <= 1,
                "slide_share and image_share must not be negative and add up to 1 at most",
            ),
            (self.learning_rate > 0, "learning_rate must be above 0"),
            (self.weight_decay >= 0, "weight_decay must not be negative"),
            (self.seed >= 0, "seed must not be negative"),
        ]
        raise_problems("cannot train:", [text for good, text in checks if not good])


def detection_loss(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of the centres and of the radii.

    Args:
        output: float32 (b, 2, h, w), of `SmallNet`.
        batch: with targets of the same h and w.

    Returns:
        The focal loss of Zhou et al. 2019, eq. 1 (alpha 2, beta 4) over the number of centres, and
        the mean smooth L1 of the log radius where it is known.
    """
    logit, log_radius = output[:, 0], output[:, 1]
    heat, centre = torch.from_numpy(batch.heat), torch.from_numpy(batch.centre)
    likely = torch.sigmoid(logit)
    missed = (1 - likely) ** 2 * F.logsigmoid(logit)
    false = (1 - heat) ** 4 * likely**2 * F.logsigmoid(-logit)
    centres = -torch.where(centre, missed, false).sum() / centre.sum().clamp(min=1)
    wanted = torch.from_numpy(batch.log_radius)
    known = ~torch.isnan(wanted)
    if not known.any():
        return centres, log_radius.sum() * 0
    return centres, F.smooth_l1_loss(log_radius[known], wanted[known], beta=0.2)


def train(config: TrainConfig, images: Sequence[LabelledImage] = ()) -> SmallNet:
    """Train a net; the same config and images give the same net on the same machine.

    Args:
        config: how.
        images: a user's labelled images, besides the scenes and slides.
    """
    torch.manual_seed(config.seed)
    net = SmallNet().to(memory_format=torch.channels_last)  # pyright: ignore
    optimiser = torch.optim.AdamW(
        net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config.learning_rate, total_steps=config.steps + 1, pct_start=0.05
    )
    pools = [(config.slide_share, generated_images(config.slides, config.seed))]
    if images:
        pools.append((config.image_share, list(images)))
    source = CropSource(pools, config.crop_px)
    net.train()
    sums, started = np.zeros(2), time.monotonic()
    for step in range(config.steps):
        rng = np.random.default_rng([config.seed, 1, step])
        batch = source.batch(rng, config.batch)
        density = torch.from_numpy(batch.density).permute(0, 3, 1, 2)  # channels last already
        losses = detection_loss(net(density), batch)
        optimiser.zero_grad(set_to_none=True)
        (losses[0] + losses[1]).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        sums += [float(loss.detach()) for loss in losses]
        if (step + 1) % _LOG_STEPS == 0:
            centres, radii = sums / _LOG_STEPS
            seconds = time.monotonic() - started
            print(f"{step + 1:6d}  centres {centres:.3f}  radii {radii:.3f}  {seconds:.0f} s")
            sums[:] = 0
    return net.eval()


def evaluate(
    detect: SmallDetector, images: Sequence[LabelledImage], distance_um: float
) -> dict[str, float]:
    """Precision, recall and F1 over images."""
    scores = []
    for image in images:
        found = detect(image.pixels, image.mpp)
        scores.append(score_detections(found[:, :2], image.nuclei[:, :2], distance_um / image.mpp))
    pooled = pool_scores(scores)
    figures = {"f1": pooled.f1, "precision": pooled.precision, "recall": pooled.recall}
    return {name: round(value, 4) for name, value in figures.items()} | {"nuclei": pooled.truth}


def read_images(
    folders: Sequence[tuple[Path, Path]], mpp: float, hold_out: Path | None
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """A user's images: those to train on and those held out.

    Raises:
        InputError: unreadable folders, or a held-out stem that is no image.
    """
    images = [image for pair in folders for image in read_folder(*pair, mpp)]
    if hold_out is None:
        return images, []
    if not hold_out.is_file():
        raise InputError(f"{hold_out}, the list of held-out images, is no file")
    stems = set(hold_out.read_text(encoding="utf-8").split())
    unknown = sorted(stems - {image.name for image in images})
    raise_problems(f"{hold_out} names images that are not there:", unknown)
    held_out = [image for image in images if image.name in stems]
    return [image for image in images if image.name not in stems], held_out


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cytoray.nuclei.train_small", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="weights to write, .safetensors")
    parser.add_argument("--images", type=Path, action="append", default=[], help="may be repeated")
    parser.add_argument("--masks", type=Path, action="append", default=[], help="one per --images")
    parser.add_argument("--mpp", type=float, default=0.5, help="um per pixel of the images")
    parser.add_argument("--hold-out", type=Path, help="file of stems to score on, not to train on")
    for name, value in asdict(TrainConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    if len(options.images) != len(options.masks):
        raise InputError("give one --masks for each --images")
    if not options.mpp > 0:
        raise InputError(f"--mpp must be above 0, not {options.mpp}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, score and write; returns the exit code."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        options = _parse(arguments)
        config = TrainConfig(**{name: getattr(options, name) for name in asdict(TrainConfig())})
        folders = list(zip(options.images, options.masks, strict=True))
        images, held_out = read_images(folders, options.mpp, options.hold_out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    started = time.monotonic()
    save_net(train(config, images), options.out)
    seconds = time.monotonic() - started
    detect = SmallDetector(SmallConfig(weights=options.out))
    figures = {
        "generated_slides_3um": evaluate(detect, generated_images(4, _HELD_OUT_SEED), 3.0),
        "painted_scenes_3um": evaluate(detect, painted_images(64, _HELD_OUT_SEED), 3.0),
    }
    if held_out:
        figures["held_out_images_6um"] = evaluate(detect, held_out, 6.0)
    record = {
        "config": asdict(config),
        "images": len(images),
        "images_mpp": options.mpp if folders else None,
        "held_out": [image.name for image in held_out],
        "figures": figures,
        "seconds": round(seconds),
        "torch": torch.__version__,
    }
    atomic_write_text(options.out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
