"""How ranks share a method: whole copies (DDP), or a piece of every parameter each (FSDP2).

With whole copies a rank holds weights, gradients, moments and the teacher, 20 bytes a parameter in
fp32: 6 GB for ViT-L, 23 GB for ViT-g. Sharded, it holds its share of them, and a block's
parameters are put together when the block is run. In fp32 the numbers are the same either way.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cytoray.ssl.base import Method

if TYPE_CHECKING:
    from cytoray.training.config import PretrainConfig

# Buffers are equal on all ranks as it is; newer PyTorch names the option anew.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
CPU_BUCKET_MB = 4
SHARDED_WIDTH = 1024  # ViT-L; below it the copies are small beside the activations
# Methods other than `forward` that run a module and so need its parameters.
_RUNS = ("encode", "forward_parts", "residual")


def resolve_sharding(
    config: PretrainConfig, *, world_size: int, embed_dim: int, is_transformer: bool
) -> str:
    """`none` for one rank, else `ddp` or `fsdp`.

    `auto` shards from ViT-L on, but no ResNet, and no encoder of which LoRA trains a little.
    """
    if world_size == 1:
        return "none"
    if config.sharding != "auto":
        return config.sharding
    pays = is_transformer and not config.backbone.lora.rank and embed_dim >= SHARDED_WIDTH
    return "fsdp" if pays else "ddp"


def share_method(method: Method, sharding: str, *, device: torch.device, bf16: bool) -> nn.Module:
    """Make the ranks share `method`, which has the same weights on each of them.

    Args:
        method: changed in place when it is sharded.
        sharding: `none`, `ddp` or `fsdp`.
        device: of this rank.
        bf16: put the pieces of a block together in bf16, which halves the traffic; gradients are
            summed in fp32 and the pieces stay fp32.

    Returns:
        The module to call in place of `method`.
    """
    if sharding == "ddp":
        options: Any = {_SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
        if device.type == "cpu":
            # The last bucket is exchanged when there is nothing left to compute meanwhile; between
            # processes of CPUs that takes as long as the bucket is large.
            options["bucket_cap_mb"] = CPU_BUCKET_MB
        return DistributedDataParallel(method, **options)
    if sharding == "fsdp":
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for network in (method.student, getattr(method, "teacher", None)):
            if network is not None:
                _shard_network(network, mesh=mesh, mp_policy=policy)
    return method


def _shard_network(network: nn.Module, **options: Any) -> None:
    """Shard each block, then what is left of the backbone, then each head."""
    # A teacher is never run backward, so nothing but this would drop its parameters after use.
    options["reshard_after_forward"] = True
    # Tokens are views of one tensor; nothing writes into them, which is what PyTorch warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for child in network.children():
        vit = getattr(child, "vit", None)
        for block in () if vit is None else cast(Any, vit).blocks:
            _shard(block, options)
        if any(True for _ in child.parameters()):
            _shard(child, options)


def _shard(module: nn.Module, options: dict[str, Any]) -> None:
    fully_shard(module, **options)
    for name in _RUNS:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def gathered(value: Any, *, keep: bool) -> Any:
    """Nested containers with every sharded tensor whole, in host memory; all ranks take part.

    Args:
        value: dicts, lists, tuples, tensors and plain values.
        keep: False: this rank helps the others only and gets empty tensors.
    """
    if isinstance(value, DTensor):
        whole = cast(DTensor, value.detach()).full_tensor()
        return whole.cpu() if keep else torch.empty(0)
    if isinstance(value, Mapping):
        return {key: gathered(item, keep=keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item, keep=keep) for item in value)
    return value


def like_parameter(whole: Tensor, parameter: Tensor) -> Tensor:
    """`whole`, which every rank has, cut as `parameter` is; as it is for a plain one."""
    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    whole = whole.to(parameter.to_local().device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def cut_model_state(method: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole state dict cut as the parameters and buffers of `method` are."""
    own = method.state_dict()
    return {key: like_parameter(x, own[key]) if key in own else x for key, x in state.items()}


def cut_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> dict[str, Any]:
    """A whole optimiser state cut as the optimiser's parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for index, found in state["state"].items():
        like = parameters[index] if index < len(parameters) else torch.empty(0)
        moments[index] = {
            name: like_parameter(x, like) if isinstance(x, Tensor) else x
            for name, x in found.items()
        }
    return {**state, "state": moments}
