"""ResNet for images: basic blocks with shortcuts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_ll_export.data.dataset import InputSpec
from edge_ll_export.models.backbones.base import Backbone
from edge_ll_export.models.backbones.standardise import Standardise


class ResNetBackbone(Backbone):
    """Images to a map, or to its mean.

    A block with more channels than the one before halves the resolution. The last block gives
    the latent; it has no ReLU unless its mean is taken.

    Source: K. He et al., Deep Residual Learning for Image Recognition, CVPR 2016; section 4.2 has
    the form for small images.

    Args:
        spec: Of the images, ``[C, H, W]``.
        channels: Of the stem, then of each block.
        latent_channels: Of the last block.
        stride: Step of the stem; 2 or 4 for images larger than about 64 pixels.
        pool: Whether the latent is the mean over the map.
    """

    def __init__(
        self,
        *,
        spec: InputSpec,
        channels: Sequence[int],
        latent_channels: int,
        stride: int,
        pool: bool,
    ) -> None:
        super().__init__()
        self.pool = pool
        colours, *size = spec.shape
        self.standardise = Standardise(colours, axis=1, axes=4)
        stem, *blocks = channels
        size = [-(-side // stride) for side in size]
        layers: list[nn.Module] = [
            nn.Conv2d(colours, stem, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(stem),
        ]
        inputs = stem
        for outputs in (*blocks, latent_channels):
            step = 2 if outputs > inputs else 1
            size = [-(-side // step) for side in size]
            layers += [nn.ReLU(), BasicBlock(inputs, outputs, stride=step)]
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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, without the last ReLU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C', H', W']``."""
        y: Tensor = self.layers(x) + self.shortcut(x)
        return y
