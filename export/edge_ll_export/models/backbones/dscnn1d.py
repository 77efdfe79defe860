"""Separable convolutions over time for sound: the cheapest backbone for waveforms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from edge_ll_export.data.dataset import InputSpec
from edge_ll_export.models.backbones.base import Backbone
from edge_ll_export.models.logmel import LogMel


class SeparableBackbone(Backbone):
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
        self.latent_shape = (latent_channels, -(-steps // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Raw waveforms ``[N, samples]`` to float32 ``[N, C, T]``."""
        latent: Tensor = self.blocks(self.features(x))
        return latent

    def calibrate(self, x: Tensor) -> None:
        """Fix the normalisation of the log-mel bands from waveforms ``[N, samples]``."""
        self.features.calibrate(x)


def _separable(inputs: int, outputs: int, *, stride: int) -> list[nn.Module]:
    return [
        nn.Conv1d(inputs, inputs, 9, stride=stride, padding=4, groups=inputs, bias=False),
        nn.BatchNorm1d(inputs),
        nn.ReLU(),
        nn.Conv1d(inputs, outputs, 1, bias=False),
        nn.BatchNorm1d(outputs),
    ]
