"""Augmentation on raw batches: small random changes that keep the label, the shape and the type.

Every draw comes from the generator that is given, so a seed decides a run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from edge_ll_export.data import InputSpec, input_spec
from edge_ll_export.recipe import AudioAugment, ImageAugment, Recipe, WindowAugment

Augmentation = Callable[[Tensor, Generator], Tensor]


def build_augmentation(recipe: Recipe) -> Augmentation:
    """The recipe's augmentation: raw batch and generator to a raw batch of the same kind."""
    spec, tables = input_spec(recipe), recipe.augment
    if spec.kind == "waveform":
        return lambda x, rng: augment_audio(x, tables.audio, spec=spec, generator=rng)
    if spec.kind == "window":
        return lambda x, rng: augment_windows(x, tables.window, generator=rng)
    if spec.kind == "text":
        return lambda x, _: x
    return lambda x, rng: augment_images(x, tables.image, spec=spec, generator=rng)


def augment_images(
    x: Tensor, table: ImageAugment, *, spec: InputSpec, generator: Generator
) -> Tensor:
    """Rotate, scale and shift about the centre, add noise, mirror; each image in its own way.

    Args:
        x: uint8 ``[N, C, H, W]``.
        table: The largest changes.
        spec: Gives the value that is full scale; results are clipped to it.
        generator: Source of every draw.
    """
    count, _, height, width = x.shape
    angle = _uniform(count, generator) * torch.deg2rad(torch.tensor(table.max_rotation_deg))
    zoom = 1 + _uniform(count, generator) * table.max_scale
    # affine_grid measures in half image sizes.
    shift_x = _uniform(count, generator) * table.max_shift_px * 2 / width
    shift_y = _uniform(count, generator) * table.max_shift_px * 2 / height
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = [cosine, -sine, shift_x, sine, cosine, shift_y]
    theta = torch.stack(rows, dim=1).view(count, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = F.grid_sample(x.to(torch.float32), grid, align_corners=False)
    level = (_uniform(count, generator).abs() * table.max_noise * spec.full_scale).view(-1, 1, 1, 1)
    noisy = moved + level * torch.randn(moved.shape, generator=generator)
    if table.mirror:
        turned = torch.rand(count, generator=generator).view(-1, 1, 1, 1) < 0.5
        noisy = torch.where(turned, noisy.flip(3), noisy)
    return noisy.round().clamp(0, spec.full_scale).to(x.dtype)


def augment_audio(
    x: Tensor, table: AudioAugment, *, spec: InputSpec, generator: Generator
) -> Tensor:
    """Shift in time with silence moved in, change the gain, add noise; each clip in its own way.

    Args:
        x: int16 ``[N, samples]``.
        table: The largest changes.
        spec: Gives the sample rate.
        generator: Source of every draw.
    """
    count, samples = x.shape
    wave = x.to(torch.float32)
    reach = round(table.max_shift_s * spec.sample_rate_hz)
    shift = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
    source = torch.arange(samples).unsqueeze(0) - shift
    inside = (source >= 0) & (source < samples)
    wave = wave.gather(1, source.clamp(0, samples - 1)) * inside
    gain = 10 ** (_uniform(count, generator) * table.max_gain_db / 20)
    wave = wave * gain.unsqueeze(1)
    rms = wave.square().mean(dim=1, keepdim=True).sqrt()
    level = _uniform(count, generator).abs().unsqueeze(1) * table.max_noise * rms
    noisy = wave + level * torch.randn(wave.shape, generator=generator)
    limits = torch.iinfo(x.dtype)
    return noisy.round().clamp(limits.min, limits.max).to(x.dtype)


def augment_windows(x: Tensor, table: WindowAugment, *, generator: Generator) -> Tensor:
    """Multiply each window by a factor, then add noise; each window in its own way.

    Args:
        x: float32 ``[N, T, C]``.
        table: The largest changes.
        generator: Source of every draw.
    """
    count = len(x)
    factor = (1 + _uniform(count, generator) * table.max_scale).view(-1, 1, 1)
    level = (_uniform(count, generator).abs() * table.max_noise).view(-1, 1, 1)
    deviation = x.std(dim=(0, 1))
    return x * factor + level * deviation * torch.randn(x.shape, generator=generator)


def _uniform(count: int, generator: Generator) -> Tensor:
    """float32 ``[count]`` in [-1, 1)."""
    return torch.rand(count, generator=generator) * 2 - 1
