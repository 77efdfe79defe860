"""Plain convolutions for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_ll_export.data.dataset import InputSpec
from edge_ll_export.models.backbones.base import Backbone


class ConvBackbone(Backbone):
    """Small images to a flat latent.

    The first block keeps the resolution, every later one halves it, the last gives the latent
    channels. The latent has no ReLU: its signs carry novelty that the classes do not need.

    Args:
        spec: Of the images, ``[C, H, W]``.
        channels: Of the hidden blocks.
        latent_channels: Of the last block.
    """

    def __init__(self, *, spec: InputSpec, channels: Sequence[int], latent_channels: int) -> None:
        super().__init__()
        self.full_scale = spec.full_scale
        inputs, height, width = spec.shape
        blocks: list[nn.Module] = []
        for i, outputs in enumerate(channels):
            stride = 1 if i == 0 else 2
            height, width = -(-height // stride), -(-width // stride)
            blocks += [
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
            inputs = outputs
        blocks += [
            nn.Conv2d(inputs, latent_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(latent_channels),
        ]
        self.blocks = nn.Sequential(*blocks)
        self.latent_shape = (latent_channels * height * width,)

    def forward(self, x: Tensor) -> Tensor:
        """Raw images ``[N, C, H, W]`` to float32 ``[N, D]``."""
        latent: Tensor = self.blocks(x.to(torch.float32) / self.full_scale)
        return latent.flatten(1)
