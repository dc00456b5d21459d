"""One SSL training step, its state, and nothing of where the batches come from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import timm
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import cytoray
from cytoray.config import to_plain
from cytoray.errors import InputError
from cytoray.models.transfer import to_device
from cytoray.perturb.views import VIEW_COLUMN
from cytoray.precision import autocast, resolve_precision
from cytoray.ssl.augment import render_views
from cytoray.ssl.base import Crops, MicroBatch, StepContext
from cytoray.ssl.methods import METHODS
from cytoray.training.config import PretrainConfig, normalisation
from cytoray.training.devices import set_block_passes
from cytoray.training.optim import (
    apply_schedule,
    build_optimizer,
    clip_per_module,
    parameter_groups,
)
from cytoray.training.schedules import patch_teacher_temp, step_values
from cytoray.training.sharding import (
    cut_model_state,
    cut_optimizer_state,
    gathered,
    resolve_sharding,
    share_method,
)

STATE_FORMAT = 1


class PretrainEngine:
    """Student, teacher, heads and optimiser of one rank.

    The step over a global batch is the same for any number of ranks: every random choice is a
    function of (seed, step, position in the global batch) and every statistic is over all ranks.

    Args:
        config: the run.
        device: where this rank computes.
        rank: this rank.
        world_size: ranks; above 1 the default process group must be initialised.

    Attributes:
        method: the SSL method with student and teacher.
        optimizer: AdamW over the student.
        sharding: `none` (one rank), `ddp` or `fsdp`.
        steps_done: steps taken, i.e. the number of the next one.
    """

    def __init__(
        self,
        config: PretrainConfig,
        device: str | torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_world(rank, world_size)
        self.config = config
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.steps_done = 0
        self.precision = resolve_precision(config.precision, self.device)
        self.mean, self.std = normalisation(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.method = METHODS[config.method](config)
        self.method.to(self.device).train()
        set_block_passes(
            self.method, self.device, pack_crops=config.pack_crops, compiled=config.compile
        )
        encoder = self.method.encoder()
        self.sharding = resolve_sharding(
            config,
            world_size=world_size,
            embed_dim=encoder.embed_dim,
            is_transformer=encoder.is_transformer,
        )
        self._model = share_method(
            self.method, self.sharding, device=self.device, bf16=self.precision == "bf16"
        )
        groups = parameter_groups(
            self.method.student,
            depth=self.method.encoder().depth,
            layer_decay=config.optim.layer_decay,
            patch_embed_lr_mult=config.optim.patch_embed_lr_mult,
        )
        clipped = self.method.clip_modules().items()
        self._clipped = {name: list(module.parameters()) for name, module in clipped}
        self.optimizer = build_optimizer(groups, beta1=config.optim.beta1, beta2=config.optim.beta2)

    def step(self, batch: Mapping[str, Any], step: int) -> dict[str, Tensor]:
        """Take one optimiser step; nothing waits for the device.

        A step whose loss or gradient is not finite changes no weight (`check_finite` tells).

        Args:
            batch: this rank's share of the global batch: `pixels` uint8 (b, S, S, 3) and `views`
                float32 (b, V, P), global views first; or the rendered `global_crops` float
                (b, G, 3, g, g) and `local_crops` (b, L, 3, l, l). When shares are not equal, also
                `global_batch` (tiles of all ranks) and `offset` (position of this rank's first).
                Arrays may still be in host memory; if `views` is not, `turned` (bool) says whether
                any `angle_deg` differs from 0 (None: suppose so).
            step: number of the step, from 0.

        Returns:
            0-d tensors: losses, gradient norms, collapse indicators, `lr`, `weight_decay`, `ema`,
            `teacher_temp`, and `teacher_patch_temp` where patches have one; equal on all ranks.

        Raises:
            InputError: the batch does not have the configured views.
        """
        values = step_values(self.config, step)
        metrics = self._gradients(self._micro_batches(batch, step, values.teacher_temp))
        norms = clip_per_module(self._clipped, self.config.optim.clip_grad)
        apply_schedule(self.optimizer, values)
        self._optimizer_step(metrics["loss"], norms)
        self.method.after_step(values.ema)
        self.steps_done = step + 1
        scheduled = {
            "lr": values.lr,
            "weight_decay": values.weight_decay,
            "ema": values.ema,
            "teacher_temp": values.teacher_temp,
        }
        if self.config.loss.teacher_patch_temp is not None:
            scheduled["teacher_patch_temp"] = patch_teacher_temp(self.config, step)
        return (
            metrics
            | norms
            | {name: torch.tensor(value, dtype=torch.float64) for name, value in scheduled.items()}
        )

    def _micro_batches(
        self, batch: Mapping[str, Any], step: int, teacher_temp: float
    ) -> list[MicroBatch]:
        crops = self._crops(batch)
        tiles = crops.global_crops.shape[0]
        context = StepContext(
            step=step,
            global_batch=int(batch.get("global_batch", tiles * self.world_size)),
            offset=int(batch.get("offset", tiles * self.rank)),
            teacher_temp=teacher_temp,
        )
        # The last batch of a run may have fewer tiles than there are micro-batches.
        return MicroBatch(crops, context).split(min(self.config.accumulate, tiles))

    def _gradients(self, batches: list[MicroBatch]) -> dict[str, Tensor]:
        """Leave the gradient of the global batch in the parameters; metrics of the method."""
        # The ranks' gradients are to be summed; both ways of sharding take their mean.
        scale = float(self.world_size)
        with self._autocast():
            known = self.method.begin(batches, scale)
        values = []
        for index, (part, its) in enumerate(zip(batches, known, strict=True)):
            with self._exchanging(last=index == len(batches) - 1):
                with self._autocast():
                    loss, found = self._model(part, its)
                (loss * scale).backward()
            values.append(found)
        return self.method.metrics(batches, known, values)

    def _exchanging(self, *, last: bool) -> AbstractContextManager:
        """Ranks exchange gradients once a step: with those of the last micro-batch."""
        if isinstance(self._model, DistributedDataParallel) and not last:
            return self._model.no_sync()
        return nullcontext()

    def _optimizer_step(self, loss: Tensor, norms: Mapping[str, Tensor]) -> None:
        finite = torch.isfinite(torch.stack([loss, *norms.values()])).all()
        # Fused AdamW skips the update on the device when `found_inf` is 1.
        cast(Any, self.optimizer).found_inf = (~finite).to(torch.float32)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> AbstractContextManager:
        return autocast(self.precision, self.device)

    def _crops(self, batch: Mapping[str, Any]) -> Crops:
        crops = self.config.crops
        if "global_crops" in batch:
            big = to_device(batch["global_crops"], self.device)
            small = batch.get("local_crops")
            small = to_device(small, self.device) if small is not None and crops.num_local else None
        else:
            views = torch.as_tensor(batch["views"])
            _check_views(views, crops.num_global + crops.num_local)
            turned = batch.get("turned")
            if turned is None and views.device.type == "cpu":  # looking here waits for nothing
                turned = bool((views[..., VIEW_COLUMN["angle_deg"]] != 0).any())
            pixels, views = to_device(batch["pixels"], self.device), to_device(views, self.device)
            big, small = (
                render_views(pixels, rows, side, self.mean, self.std, turned=turned)
                if rows.shape[1]
                else None
                for rows, side in (
                    (views[:, : crops.num_global], crops.global_px),
                    (views[:, crops.num_global :], crops.local_px),
                )
            )
        return Crops(cast(Tensor, big), small)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: tensors (not copied) and plain values only.

        `rng` is this rank's; all else is equal on all ranks. Under `fsdp` all ranks must call it,
        and rank 0 alone gets the tensors, whole and in host memory: the same state as under `ddp`.
        """
        state = {
            "format": STATE_FORMAT,
            "step": self.steps_done,
            "config": to_plain(self.config),
            "versions": {
                "cytoray": cytoray.__version__,
                "torch": str(torch.__version__),
                "timm": timm.__version__,
            },
            "model": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng_state(),
        }
        return gathered(state, keep=self.rank == 0)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, on this device, with any number of ranks and any sharding.

        All ranks are given the whole state.

        Raises:
            InputError: the state is of another architecture or format.
        """
        if state.get("format") != STATE_FORMAT:
            raise InputError(
                f"training state has format {state.get('format')!r}, this version reads "
                f"{STATE_FORMAT}; continue with cytoray {state.get('versions', {}).get('cytoray')}"
            )
        try:
            self.method.load_state_dict(cut_model_state(self.method, state["model"]))
            self.optimizer.load_state_dict(cut_optimizer_state(self.optimizer, state["optimizer"]))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the checkpoint does not fit the configured model: {error}"
            ) from error
        self.steps_done = int(state["step"])
        self.load_rng_state(state["rng"])

    def rng_state(self) -> dict[str, Tensor]:
        """State of torch's generators on this rank (used only by dropout inside a backbone)."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_rng_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore `rng_state`; a state of another kind of device is passed over."""
        torch.set_rng_state(state["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """Weights of the encoder so far (the teacher's), timm keys; see `encoder_spec`.

        Under `fsdp` all ranks must call it; rank 0 alone gets the tensors.
        """
        return gathered(self.method.encoder().encoder_weights(), keep=self.rank == 0)


def _check_world(rank: int, world_size: int) -> None:
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if size != world_size or not 0 <= rank < world_size:
        raise InputError(
            f"rank {rank} of {world_size} does not fit the process group of {size}; call "
            "torch.distributed.init_process_group before building the engine"
        )


def _check_views(views: Tensor, wanted: int) -> None:
    if views.dim() != 3 or views.shape[1] != wanted:
        raise InputError(
            f"the batch has views of shape {tuple(views.shape)}, the configuration wants {wanted} "
            "a tile (crops.num_global + crops.num_local); make the crop policy agree"
        )
