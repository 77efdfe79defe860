"""DS-CNN for sound: separable convolutions over time and frequency."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_ll_export.data.dataset import InputSpec
from edge_ll_export.models.backbones.base import Backbone
from edge_ll_export.models.logmel import LogMel

_FRAME_S, _HOP_S = 0.040, 0.020  # as in the paper
_BANDS = 20
_KERNEL, _STRIDE = (10, 8), (2, 4)  # of the stem, over time and bands: 25 x 5 from one second


class DsCnnBackbone(Backbone):
    """Waveforms to a map over time and frequency; one second gives ``[C, 25, 5]``.

    DS-CNN (Zhang et al., Hello Edge: Keyword Spotting on Microcontrollers, 2017), on log-mel
    bands in place of cepstral coefficients, which leaves a transform out and keeps neighbours
    in frequency next to each other.

    Args:
        spec: Of the waveforms, ``[samples]``.
        channels: Of the stem, then of each separable block.
        latent_channels: Of the last block.
        pool: Whether the latent is the mean over the map.
    """

    def __init__(
        self, *, spec: InputSpec, channels: Sequence[int], latent_channels: int, pool: bool
    ) -> None:
        super().__init__()
        self.pool = pool
        rate = spec.sample_rate_hz
        self.features = LogMel(
            sample_rate_hz=rate,
            full_scale=spec.full_scale,
            frame=round(_FRAME_S * rate),
            hop=round(_HOP_S * rate),
            mels=_BANDS,
        )
        stem, *blocks = channels
        padding = (_KERNEL[0] // 2, (_KERNEL[1] - _STRIDE[1]) // 2)
        layers: list[nn.Module] = [
            nn.Conv2d(1, stem, _KERNEL, stride=_STRIDE, padding=padding, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(),
        ]
        inputs = stem
        for outputs in blocks:
            layers += [*separable(inputs, outputs), nn.ReLU()]
            inputs = outputs
        self.blocks = nn.Sequential(*layers, *separable(inputs, latent_channels))
        steps = self.features.frames(spec.shape[0])
        height, width = (
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                (steps, _BANDS), padding, _KERNEL, _STRIDE, strict=True
            )
        )
        self.latent_shape = (latent_channels,) if pool else (latent_channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        """Raw waveforms ``[N, samples]`` to float32 ``[N, C, T, F]``, or ``[N, C]``."""
        latent: Tensor = self.blocks(self.features(x).transpose(1, 2).unsqueeze(1))
        return torch.relu(latent).mean(dim=(2, 3)) if self.pool else latent

    def calibrate(self, x: Tensor) -> None:
        """Fix the normalisation of the log-mel bands from waveforms ``[N, samples]``."""
        self.features.calibrate(x)


def separable(inputs: int, outputs: int) -> list[nn.Module]:
    """A 3x3 convolution of each channel alone, then a mix of the channels, without a last ReLU."""
    return [
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
    ]
