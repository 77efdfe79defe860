"""Backbones: raw input to latent, frozen on the device and exported whole.

Scaling and feature extraction are part of the graph. Batch norms are frozen at export and fold
into the convolutions before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_ll_export.data import InputSpec, input_spec
from edge_ll_export.models.logmel import LogMel
from edge_ll_export.models.seeding import seeded
from edge_ll_export.recipe import Recipe


class ConvBackbone(nn.Module):
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
        self.latent_shape: tuple[int, ...] = (latent_channels * height * width,)

    def forward(self, x: Tensor) -> Tensor:
        """Raw images ``[N, C, H, W]`` to float32 ``[N, D]``."""
        latent: Tensor = self.blocks(x.to(torch.float32) / self.full_scale)
        return latent.flatten(1)

    def calibrate(self, x: Tensor) -> None:
        """Nothing to fix from data: images have a known scale."""


class SeparableBackbone(nn.Module):
    """Waveforms to a latent over time, by separable convolutions on log-mel bands.

    After DS-CNN (Zhang et al., Hello Edge, 2017), with convolutions over time only and the bands
    as channels (Choi et al., TC-ResNet, 2019), which is cheaper on small processors.

    Args:
        spec: Of the waveforms, ``[samples]``.
        channels: Of the stem, then of each separable block.
        latent_channels: Of the last block.
    """

    def __init__(self, *, spec: InputSpec, channels: Sequence[int], latent_channels: int) -> None:
        super().__init__()
        self.features = LogMel(sample_rate_hz=spec.sample_rate_hz, full_scale=spec.full_scale)
        steps = self.features.frames(spec.shape[0])
        stem = channels[0]
        blocks: list[nn.Module] = [
            nn.Conv1d(self.features.mels, stem, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm1d(stem),
            nn.ReLU(),
        ]
        steps = -(-steps // 2)
        inputs = stem
        for outputs in channels[1:]:
            blocks += [*_separable(inputs, outputs, stride=1), nn.ReLU()]
            inputs = outputs
        blocks += _separable(inputs, latent_channels, stride=2)
        self.blocks = nn.Sequential(*blocks)
        self.latent_shape: tuple[int, ...] = (latent_channels, -(-steps // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Raw waveforms ``[N, samples]`` to float32 ``[N, C, T]``."""
        latent: Tensor = self.blocks(self.features(x))
        return latent

    def calibrate(self, x: Tensor) -> None:
        """Fix the normalisation of the log-mel bands from waveforms ``[N, samples]``."""
        self.features.calibrate(x)


AnyBackbone = ConvBackbone | SeparableBackbone


def build_backbone(recipe: Recipe) -> AnyBackbone:
    """The recipe's backbone with fresh weights from the recipe's seed."""
    table = recipe.student.backbone
    kind = SeparableBackbone if table.kind == "dscnn" else ConvBackbone
    with seeded(recipe.seed):
        return kind(
            spec=input_spec(recipe),
            channels=table.channels,
            latent_channels=table.latent_channels,
        )


def _separable(inputs: int, outputs: int, *, stride: int) -> list[nn.Module]:
    return [
        nn.Conv1d(inputs, inputs, 9, stride=stride, padding=4, groups=inputs, bias=False),
        nn.BatchNorm1d(inputs),
        nn.ReLU(),
        nn.Conv1d(inputs, outputs, 1, bias=False),
        nn.BatchNorm1d(outputs),
    ]
