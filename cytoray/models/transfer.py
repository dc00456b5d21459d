"""Host arrays to the device without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(array: Any, device: torch.device) -> Tensor:
    """A numpy array or tensor on `device`; to CUDA through pinned memory, asynchronously."""
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        array = array.copy()
    tensor = torch.as_tensor(array)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
