"""MobileNetV2 for images: inverted residuals with linear bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_ll_export.data.dataset import InputSpec
from edge_ll_export.models.backbones.base import Backbone
from edge_ll_export.models.backbones.standardise import Standardise

_EXPANSION = 6  # as in the paper


class MobileNetBackbone(Backbone):
    """Images to a map, or to its mean.

    A block with more channels than the one before halves the resolution. The latent is the last
    block's bottleneck, which is linear.

    Source: M. Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018.

    Args:
        spec: Of the images, ``[C, H, W]``.
        channels: Of the stem, then of each block.
        latent_channels: Of the last block.
        stride: Step of the stem; 2 or 4 for images larger than about 64 pixels.
        width: Multiplies the channels of stem and blocks; rounded to multiples of 8.
        pool: Whether the latent is the mean over the map.
    """

    def __init__(
        self,
        *,
        spec: InputSpec,
        channels: Sequence[int],
        latent_channels: int,
        stride: int,
        width: float,
        pool: bool,
    ) -> None:
        super().__init__()
        self.pool = pool
        colours, *size = spec.shape
        self.standardise = Standardise(colours, axis=1, axes=4)
        stem, *blocks = [max(8, round(width * c / 8) * 8) for c in channels]
        size = [-(-side // stride) for side in size]
        layers: list[nn.Module] = [
            nn.Conv2d(colours, stem, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU6(),
        ]
        inputs = stem
        for outputs in (*blocks, latent_channels):
            step = 2 if outputs > inputs else 1
            size = [-(-side // step) for side in size]
            layers.append(InvertedResidual(inputs, outputs, stride=step))
            inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.latent_shape = (latent_channels,) if pool else (latent_channels, *size)

    def forward(self, x: Tensor) -> Tensor:
        """Raw images ``[N, C, H, W]`` to float32 ``[N, C', H', W']``, or ``[N, C']``."""
        latent: Tensor = self.blocks(self.standardise(x))
        return torch.relu(latent).mean(dim=(2, 3)) if self.pool else latent

    def calibrate(self, x: Tensor) -> None:
        """Fix mean and deviation of each colour from images ``[N, C, H, W]``."""
        self.standardise.calibrate(x)


class InvertedResidual(nn.Module):
    """Widen, convolve each channel alone, narrow without a ReLU; residual where sizes agree."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        hidden = _EXPANSION * inputs
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C', H', W']``."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y
