"""Linear layers and dropout over many instances, at the speed a CPU has for them.

Both are `torch.nn`'s layers, with the same parameters and the same answer; they differ in how a CPU
is asked for it. Elsewhere, and on few instances, they are `torch.nn`'s own.

Shapes: T instances, D width of the input, H width of the output.
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

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, relu: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        """(T, D) to (T, H)."""
        return linear(input, self.weight, self.bias, relu=self.relu)


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws 16 random bits an element on a CPU, four elements at once.

    torch draws a number for each element, one after another: for a layer over many instances that
    takes longer than its product. The share left out is `p` to 1 / 65,536, and what stays is
    scaled by the very share that stays.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        left_out = round(self.p * 65_536)
        if not self.training or input.device.type != "cpu" or not 0 < left_out < 65_536:
            return super().forward(input)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: input.numel()].view(input.shape)
        mask = torch.empty(input.shape, dtype=input.dtype)
        torch.ge(bits, left_out - 32_768, out=mask)
        return input * mask.mul_(65_536 / (65_536 - left_out))
