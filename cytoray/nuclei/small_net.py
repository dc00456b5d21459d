"""The network of the `small` detector, and its weights on disk (safetensors with a header).

Shapes: b images, h and w pixels at `WORK_UM` per pixel; outputs are at half of that resolution.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cytoray.errors import InputError
from cytoray.io import atomic_write_bytes
from cytoray.nuclei.small import MULTIPLE_PX, REFERENCE_UM, SHIPPED_WEIGHTS, STRIDE

FORMAT = "cytoray small nuclei detector 1"
WIDTHS = (16, 32, 48)
_PRIOR_LOGIT = -4.0  # nearly every pixel is no centre: training starts from there


class ConvBlock(nn.Module):
    """Convolution 3x3, batch norm, ReLU; with `residual`, the input is added before the ReLU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, residual: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return F.relu(y + x if self.residual else y, inplace=True)

    def fold(self) -> None:
        """Take the batch norm into the convolution; for inference only."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class SmallNet(nn.Module):
    """A fully convolutional net: down to one eighth, up again to one half.

    Args:
        widths: channels at one half, one quarter and one eighth of the resolution.
    """

    def __init__(self, widths: tuple[int, int, int] = WIDTHS) -> None:
        super().__init__()
        fine, middle, coarse = self.widths = widths
        self.at_half = nn.Sequential(
            ConvBlock(3, fine, stride=2), ConvBlock(fine, fine, residual=True)
        )
        self.at_quarter = nn.Sequential(
            ConvBlock(fine, middle, stride=2),
            ConvBlock(middle, middle, residual=True),
            ConvBlock(middle, middle, residual=True),
        )
        self.at_eighth = nn.Sequential(
            ConvBlock(middle, coarse, stride=2),
            *(ConvBlock(coarse, coarse, residual=True) for _ in range(4)),
        )
        self.to_quarter = nn.Conv2d(coarse, middle, 1)
        self.join_quarter = ConvBlock(middle, middle)
        self.to_half = nn.Conv2d(middle, fine, 1)
        self.join_half = ConvBlock(fine, 24)
        self.head = nn.Conv2d(24, 2, 1)
        nn.init.constant_(self.head.bias[0:1], _PRIOR_LOGIT)  # pyright: ignore

    def forward(self, density_b3hw: Tensor) -> Tensor:
        """Logit of a centre, and log radius.

        Args:
            density_b3hw: float32, optical density of red, green and blue against the glass
                (`small.normalise`); h and w are multiples of 8.

        Returns:
            float32 (b, 2, h / 2, w / 2): logit that a nucleus has its centre here, and the natural
            logarithm of its radius over 4 um.
        """
        half = self.at_half(density_b3hw)
        quarter = self.at_quarter(half)
        up = F.interpolate(self.to_quarter(self.at_eighth(quarter)), scale_factor=2.0)
        quarter = self.join_quarter(quarter + up)
        up = F.interpolate(self.to_half(quarter), scale_factor=2.0)
        return self.head(self.join_half(half + up))

    def fold(self) -> SmallNet:
        """Batch norms folded into the convolutions, channels last, ready for inference."""
        self.eval()
        for module in list(self.modules()):
            if isinstance(module, ConvBlock):
                module.fold()
        return self.to(memory_format=torch.channels_last).requires_grad_(False)  # pyright: ignore


def save_net(net: SmallNet, path: str | os.PathLike[str]) -> None:
    """Write weights and what they are to `path`, whole or not at all."""
    header = {"format": FORMAT, "widths": json.dumps(net.widths)}
    tensors = {name: value.detach().contiguous() for name, value in net.state_dict().items()}
    atomic_write_bytes(path, save(tensors, metadata=header))


def load_net(path: str | os.PathLike[str] = "") -> SmallNet:
    """Read a net in evaluation mode.

    Args:
        path: a file that `train_small` wrote; empty for the weights that come with the package.

    Raises:
        InputError: no such file, damaged, or weights of something else.
    """
    file = Path(path).expanduser() if os.fspath(path) else SHIPPED_WEIGHTS
    if not file.is_file():
        raise InputError(
            f"the small nuclei detector has no weights: {file} is no file. Leave the option "
            "`weights` empty for those of the package, or train some with "
            "`python -m cytoray.nuclei.train_small`"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            header: Mapping[str, str] = opened.metadata() or {}
        if header.get("format") != FORMAT:
            raise ValueError(f"its header does not say {FORMAT!r}")
        net = SmallNet(tuple(json.loads(header["widths"])))  # pyright: ignore
        net.load_state_dict(load(file.read_bytes()))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{file} holds no weights of the small nuclei detector "
            f"({str(error).splitlines()[0]}); give a file written by "
            "`python -m cytoray.nuclei.train_small`, or none for the weights of the package"
        ) from error
    return net.eval()


def forward_density(net: SmallNet, density: Tensor) -> tuple[Tensor, Tensor]:
    """One forward pass over one image of any size.

    Args:
        net: the net, folded or not.
        density: float32 (h, w, 3).

    Returns:
        centre logit and radius in um, each float32 (ceil(h / 2), ceil(w / 2)).
    """
    height, width = density.shape[:2]
    pad = (0, -width % MULTIPLE_PX, 0, -height % MULTIPLE_PX)
    image = F.pad(density.permute(2, 0, 1)[None], pad)
    with torch.inference_mode():
        out = net(image.contiguous(memory_format=torch.channels_last))[0]
    out = out[:, : -(-height // STRIDE), : -(-width // STRIDE)]
    return out[0], out[1].clamp(-2, 2).exp() * REFERENCE_UM
