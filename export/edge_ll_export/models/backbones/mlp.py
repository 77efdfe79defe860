"""Linear layers for short windows of sensor values."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from edge_ll_export.data.dataset import InputSpec
from edge_ll_export.models.backbones.base import Backbone
from edge_ll_export.models.backbones.standardise import Standardise


class MlpBackbone(Backbone):
    """Windows, laid out flat, to a flat latent.

    Args:
        spec: Of the windows, ``[T, C]``.
        channels: Sizes of the hidden layers.
        latent_channels: Size of the latent.
    """

    def __init__(self, *, spec: InputSpec, channels: Sequence[int], latent_channels: int) -> None:
        super().__init__()
        self.standardise = Standardise(spec.shape[1], axis=2, axes=3)
        inputs = math.prod(spec.shape)
        layers: list[nn.Module] = []
        for outputs in channels:
            layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU()]
            inputs = outputs
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, latent_channels))
        self.latent_shape = (latent_channels,)

    def forward(self, x: Tensor) -> Tensor:
        """Raw windows float32 ``[N, T, C]`` to float32 ``[N, D]``."""
        latent: Tensor = self.layers(self.standardise(x).flatten(1))
        return latent

    def calibrate(self, x: Tensor) -> None:
        """Fix mean and deviation of each sensor from windows ``[N, T, C]``."""
        self.standardise.calibrate(x)
