"""What may happen to a field between the stain and the file: the augmentations of training.

All work on uint8 (h, w, 3) at the working scale. Nothing here turns dark into bright: in every
stain nuclei are darker than what surrounds them.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from cytoray.synthetic.textures import Float, smooth_noise

Image = NDArray[np.uint8]


def augment(rng: np.random.Generator, pixels: Image, nuclei: Float) -> tuple[Image, Float]:
    """Draw one appearance of a field.

    Args:
        rng: the source of randomness.
        pixels: uint8 (side, side, 3).
        nuclei: float32 (N, 3), x_px, y_px, radius_px.

    Returns:
        pixels and nuclei of the same kind; nuclei under a border are gone.
    """
    pixels, nuclei = _turned(rng, pixels, nuclei)
    light = pixels.astype(np.float32)
    if rng.random() < 0.7:
        light = _other_stain(rng, light)
    if rng.random() < 0.3:
        weights = rng.dirichlet((2.0, 2.0, 2.0)).astype(np.float32)
        light = np.repeat((light @ weights)[..., None], 3, axis=2)
        light = light * (1 + rng.normal(0, 0.03, 3) * (rng.random() < 0.3))
    light = _optics(rng, _tone(rng, _float32(light)))
    light, nuclei = _border(rng, light, nuclei) if rng.random() < 0.12 else (light, nuclei)
    out = np.clip(np.rint(light), 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        quality = int(rng.integers(30, 96))
        _, coded = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, quality])
        out = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    return out, nuclei


def _float32(values: np.ndarray) -> Float:
    return np.asarray(values, np.float32)


def _turned(rng: np.random.Generator, pixels: Image, nuclei: Float) -> tuple[Image, Float]:
    """One of the eight orientations of a square."""
    nuclei, last = nuclei.copy(), pixels.shape[0] - 1
    if rng.random() < 0.5:
        pixels, nuclei[:, 0] = pixels[:, ::-1], last - nuclei[:, 0]
    if rng.random() < 0.5:
        pixels, nuclei[:, 1] = pixels[::-1], last - nuclei[:, 1]
    if rng.random() < 0.5:
        pixels, nuclei[:, :2] = pixels.transpose(1, 0, 2), nuclei[:, 1::-1].copy()
    return np.ascontiguousarray(pixels), nuclei


def _other_stain(rng: np.random.Generator, light: Float) -> Float:
    """Mix and scale the channels' densities, swap them now and then: another stain, another lamp.

    All weights are positive, so what is densest stays densest.
    """
    glass = np.maximum(np.percentile(light[::4, ::4], 98, axis=(0, 1)), 60).astype(np.float32)
    density = np.log((glass + 4) / (light + 4))
    mix = np.diag(np.exp(rng.normal(0, 0.3, 3))) + rng.uniform(0, 0.3, (3, 3)) * rng.random()
    if rng.random() < 0.3:
        mix = mix[rng.permutation(3)]
    mix = mix * np.exp(rng.normal(-0.1, 0.25))
    other = np.clip(glass.mean() + rng.normal(0, 15) + rng.normal(0, 8, 3), 120, 255)
    out = np.exp(-density @ mix.astype(np.float32)) * (other.astype(np.float32) + 4) - 4
    return _float32(out)


def _tone(rng: np.random.Generator, light: Float) -> Float:
    """Gamma, contrast and brightness of the camera; shade across the field."""
    if rng.random() < 0.5:
        gamma = np.exp(rng.normal(0, 0.2))
        light = _float32(255 * np.power(np.clip(light, 0, 255) / 255, gamma))
    if rng.random() < 0.5:
        darker = abs(rng.normal(0, 15))
        light = _float32((light - 255) * np.exp(rng.normal(0, 0.15)) + 255 - darker)
    if rng.random() < 0.2:
        height, width = light.shape[:2]
        shade = smooth_noise(rng, height, width, 0.7 * width)
        light = _float32(light * (1 + np.float32(0.1) * shade)[..., None])
    return light


def _optics(rng: np.random.Generator, light: Float) -> Float:
    """Blur, sharpening, coarse pixels, noise."""
    side = light.shape[0]
    chance = rng.random()
    if chance < 0.35:
        light = _float32(cv2.GaussianBlur(light, (0, 0), rng.uniform(0.3, 1.6)))
    elif chance < 0.55:
        soft = cv2.GaussianBlur(light, (0, 0), rng.uniform(0.7, 1.6))
        light = _float32(light + rng.uniform(0.3, 1.5) * (light - soft))
    elif chance < 0.65:
        small = max(8, round(side * rng.uniform(0.45, 0.9)))
        coarse = cv2.resize(light, (small, small), interpolation=cv2.INTER_AREA)
        light = _float32(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_LINEAR))
    if rng.random() < 0.6:
        noise = rng.standard_normal(light.shape, dtype=np.float32) * abs(rng.normal(0, 5))
        if rng.random() < 0.3:
            noise = _float32(cv2.GaussianBlur(noise, (0, 0), 0.7) * 2)
        light = _float32(light + (noise if rng.random() < 0.5 else noise[..., :1]))
    return light


def _border(rng: np.random.Generator, light: Float, nuclei: Float) -> tuple[Float, Float]:
    """Cut the field by a black or white straight border."""
    height, width = light.shape[:2]
    angle = rng.choice([0, 90, 180, 270]) if rng.random() < 0.5 else rng.uniform(0, 360)
    normal = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))], np.float32)
    offset = float(normal @ np.array([width, height]) / 2) + rng.uniform(0.05, 0.45) * width
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cover = np.clip(x * normal[0] + y * normal[1] - offset + 0.5, 0, 1)[..., None]
    shade = np.float32(255 if rng.random() < 0.5 else rng.uniform(0, 20))
    visible = nuclei[:, :2] @ normal < offset
    return _float32(light * (1 - cover) + shade * cover), nuclei[visible]
