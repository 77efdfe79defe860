"""Temporal convolutional network for windows of sensor values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_ll_export.data.dataset import InputSpec
from edge_ll_export.models.backbones.base import Backbone
from edge_ll_export.models.backbones.standardise import Standardise

_KERNEL = 3


class TcnBackbone(Backbone):
    """Windows to a latent over time, or to its mean; no step sees a later one.

    Each block looks twice as far back as the one before: with k blocks, a step sees the
    ``1 + 4 * (2**k - 1)`` last steps of the stem.

    Source: S. Bai, J. Z. Kolter, V. Koltun, An Empirical Evaluation of Generic Convolutional and
    Recurrent Networks for Sequence Modeling, 2018; with batch norms, which fold into the
    convolutions at export, in place of weight norm and dropout.

    Args:
        spec: Of the windows, ``[T, C]``.
        channels: Of each block.
        latent_channels: Of the latent.
        stride: Steps that the stem takes together; the oldest group is filled up with zeros.
        pool: Whether the latent is the mean over time.
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
        steps, sensors = spec.shape
        self.standardise = Standardise(sensors, axis=2, axes=3)
        self.fill = -steps % stride
        self.stem = nn.Conv1d(sensors, channels[0], stride, stride=stride)
        inputs = [channels[0], *channels[:-1]]
        self.blocks = nn.Sequential(
            *(
                DilatedBlock(a, b, dilation=2**i)
                for i, (a, b) in enumerate(zip(inputs, channels, strict=True))
            )
        )
        self.mix = nn.Sequential(
            nn.Conv1d(channels[-1], latent_channels, 1, bias=False),
            nn.BatchNorm1d(latent_channels),
        )
        steps = -(-steps // stride)
        self.latent_shape = (latent_channels,) if pool else (latent_channels, steps)

    def forward(self, x: Tensor) -> Tensor:
        """Raw windows float32 ``[N, T, C]`` to float32 ``[N, C', T']``, or ``[N, C']``."""
        h = F.pad(self.standardise(x).transpose(1, 2), (self.fill, 0))
        latent: Tensor = self.mix(self.blocks(self.stem(h)))
        return torch.relu(latent).mean(dim=2) if self.pool else latent

    def calibrate(self, x: Tensor) -> None:
        """Fix mean and deviation of each sensor from windows ``[N, T, C]``."""
        self.standardise.calibrate(x)


class DilatedBlock(nn.Module):
    """Two causal convolutions with holes, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, dilation: int) -> None:
        super().__init__()
        self.past = (_KERNEL - 1) * dilation
        self.first = nn.Conv1d(inputs, outputs, _KERNEL, dilation=dilation, bias=False)
        self.first_norm = nn.BatchNorm1d(outputs)
        self.second = nn.Conv1d(outputs, outputs, _KERNEL, dilation=dilation, bias=False)
        self.second_norm = nn.BatchNorm1d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, T]`` to ``[N, C', T]``."""
        h = torch.relu(self.first_norm(self.first(F.pad(x, (self.past, 0)))))
        h = torch.relu(self.second_norm(self.second(F.pad(h, (self.past, 0)))))
        return torch.relu(h + self.shortcut(x))
