"""Matrix products at the speed a device has for them.

Shapes: T rows (instances, tokens), D width of the input, H width of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALL = 32_768
"""Elements; below, torch gives convolutions to its own kernels, and nothing is to be won."""


def linear(
    x_td: Tensor, weight_hd: Tensor, bias_h: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """x W^T + b, or ReLU of it: (T, D) to (T, H), differentiable as `F.linear` is.

    On a CPU, torch leaves float32 products to MKL, which uses half the width of the vector units
    of AMD's Zen 4 and 5; and convolutions to oneDNN, which uses all of it. A product is the
    convolution, with a kernel of 1, of a row of T pixels with D channels. Both are exact float32.
    """
    if not _suits_onednn(x_td, weight_hd):
        out_th = F.linear(x_td, weight_hd, bias_h)
        return out_th.relu_() if relu else out_th
    pixels_1d1t = x_td.contiguous()[None, None].permute(0, 3, 1, 2)  # channels last, no copy
    # Dilation is nothing to a kernel of 1; without any, torch leaves oneDNN on a single thread.
    out_1h1t = F.conv2d(pixels_1d1t, weight_hd[:, :, None, None], bias_h, dilation=(2, 1))
    if relu:  # before the view: in place on a view costs autograd a copy of the gradient
        out_1h1t = out_1h1t.relu_()
    return out_1h1t.permute(0, 2, 3, 1).flatten(0, 2)


def _suits_onednn(x_td: Tensor, weight_hd: Tensor) -> bool:
    return (
        x_td.ndim == 2
        and x_td.device.type == "cpu"
        and x_td.dtype == weight_hd.dtype == torch.float32
        and x_td.numel() > _SMALL
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


class Linear(nn.Linear):
    """`nn.Linear` by `linear`; with `relu`, the ReLU that follows it as well."""

    relu = False

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, relu: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., H)."""
        rows = input.flatten(0, -2) if input.ndim > 2 else input
        out = linear(rows, self.weight, self.bias, relu=self.relu)
        return out.unflatten(0, input.shape[:-1]) if input.ndim > 2 else out


def use_cpu_products(model: nn.Module) -> None:
    """Let the linear layers of any model be `Linear`; parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class PatchProjection(nn.Conv2d):
    """The convolution of a patch embedding as the product it is: no pixel is in two patches.

    cuDNN gives a convolution of three channels to kernels that take ten times as long.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B, D, rows, columns)."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):  # before pixels are put in order: half as many bytes
            input = input.to(torch.get_autocast_dtype(kind))
        height, width = self.kernel_size
        if input.shape[2] % height or input.shape[3] % width:
            return super().forward(input)
        cut = input.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, r, h, c, w)
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def use_patch_products(model: nn.Module) -> None:
    """Let convolutions that cut images into patches be `PatchProjection`; parameters stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _cuts_patches(module):
            module.__class__ = PatchProjection


def _cuts_patches(conv: nn.Conv2d) -> bool:
    return (
        conv.stride == conv.kernel_size
        and conv.kernel_size[0] > 1
        and conv.padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )
