"""Teachers: large, accurate, and never shipped; they take the student's raw input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_ll_export.data import InputSpec, input_spec
from edge_ll_export.models.logmel import LogMel
from edge_ll_export.models.seeding import seeded
from edge_ll_export.recipe import Recipe


class ImageTeacher(nn.Module):
    """Four 3x3 convolutions with one halving, for small images.

    Args:
        spec: Of the images, ``[C, H, W]``.
        width: Channels of the first two convolutions; the others have twice as many.
        capacity: Number of logits.
    """

    def __init__(self, *, spec: InputSpec, width: int, capacity: int) -> None:
        super().__init__()
        self.full_scale = spec.full_scale
        inputs, height, breadth = spec.shape
        self.blocks = nn.Sequential(
            *_block(inputs, width, stride=1),
            *_block(width, width, stride=1),
            *_block(width, 2 * width, stride=2),
            *_block(2 * width, 2 * width, stride=1),
            nn.Flatten(),
            nn.Linear(2 * width * -(-height // 2) * -(-breadth // 2), capacity),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Raw images ``[N, C, H, W]`` to logits float32 ``[N, capacity]``."""
        logits: Tensor = self.blocks(x.to(torch.float32) / self.full_scale)
        return logits

    def calibrate(self, x: Tensor) -> None:
        """Nothing to fix from data: images have a known scale."""


class AudioTeacher(nn.Module):
    """2D convolutions over log-mel bands and time, then the mean over both.

    Args:
        spec: Of the waveforms, ``[samples]``.
        width: Channels of the first convolution; doubled twice after.
        capacity: Number of logits.
    """

    def __init__(self, *, spec: InputSpec, width: int, capacity: int) -> None:
        super().__init__()
        self.features = LogMel(sample_rate_hz=spec.sample_rate_hz, full_scale=spec.full_scale)
        self.blocks = nn.Sequential(
            *_block(1, width, stride=2),
            *_block(width, 2 * width, stride=2),
            *_block(2 * width, 4 * width, stride=2),
            *_block(4 * width, 4 * width, stride=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, capacity),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Raw waveforms ``[N, samples]`` to logits float32 ``[N, capacity]``."""
        logits: Tensor = self.blocks(self.features(x).unsqueeze(1))
        return logits

    def calibrate(self, x: Tensor) -> None:
        """Fix the normalisation of the log-mel bands from waveforms ``[N, samples]``."""
        self.features.calibrate(x)


AnyTeacher = ImageTeacher | AudioTeacher


def build_teacher(recipe: Recipe) -> AnyTeacher:
    """The recipe's teacher with fresh weights from the recipe's seed."""
    kind = AudioTeacher if input_spec(recipe).sample_rate_hz else ImageTeacher
    with seeded(recipe.seed + 2):
        return kind(
            spec=input_spec(recipe),
            width=recipe.teacher.width,
            capacity=recipe.classes.capacity,
        )


def _block(inputs: int, outputs: int, *, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
