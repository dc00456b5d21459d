"""Where weights come from: local files without code in them, and the hub while it answers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cytoray.errors import InputError

_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a `.safetensors` file, or of a PyTorch file without any code in it.

    A wrapping `state_dict`, `model` or `teacher` entry and a common prefix (`module.`,
    `backbone.`) are taken off.

    Raises:
        InputError: no such file, or one that does not hold plain tensors.
    """
    if not path.is_file():
        raise InputError(f"no file of weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as weights: {first_line(error)}") from error
    except Exception as error:  # the unpickler's own refusal
        raise InputError(
            f"{path} holds more than tensors and is not read; save it as .safetensors "
            f"({first_line(error)})"
        ) from error
    for name in ("state_dict", "model", "teacher"):
        if isinstance(held, dict) and isinstance(held.get(name), dict):
            held = held[name]
    if not isinstance(held, dict) or not all(isinstance(v, Tensor) for v in held.values()):
        raise InputError(f"{path} does not hold tensors by name")
    for prefix in ("module.", "backbone."):
        if held and all(key.startswith(prefix) for key in held):
            held = {key.removeprefix(prefix): value for key, value in held.items()}
    return held


@contextmanager
def hub_connection() -> Iterator[None]:
    """Within, a hub that does not answer is given up at once and only its cache is used.

    Its own client tries each file for half a minute before it says so.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@lru_cache(maxsize=4)
def _answers(endpoint: str) -> bool:
    """Whether a host lets itself be connected to; through a proxy only the client can tell."""
    if any(
        name.lower() in ("https_proxy", "all_proxy") and os.environ[name] for name in os.environ
    ):
        return True
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """The first lines of a message as one, shortened."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2] or [type(error).__name__])[:300]
