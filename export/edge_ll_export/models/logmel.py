"""Log-mel features as a torch module, so that an exported graph takes the raw waveform."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_ll.errors import DataError

_FLOOR = 1e-6  # of the power, full scale being 1: far below any microphone's noise


class LogMel(nn.Module):
    """Waveform to normalised log-mel bands, in operators that every runtime has.

    Framing and the Hann-windowed DFT are one strided convolution with fixed weights (a framed
    DFT *is* a correlation with cosines and sines). Power, mel filters (the HTK formula), log and
    a fixed normalisation for each band follow.

    Args:
        sample_rate_hz: Of the waveform.
        full_scale: Raw value that becomes 1.0.
        frame: Samples in a frame, and points of the DFT.
        hop: Samples from one frame to the next.
        mels: Number of bands.
    """

    dft: Tensor
    filters: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        sample_rate_hz: int,
        full_scale: float,
        frame: int = 256,
        hop: int = 128,
        mels: int = 32,
    ) -> None:
        super().__init__()
        self.full_scale, self.hop, self.mels = full_scale, hop, mels
        self.register_buffer("dft", _windowed_dft(frame), persistent=False)
        self.register_buffer("filters", mel_filters(sample_rate_hz, frame, mels), persistent=False)
        self.register_buffer("mean", torch.zeros(mels, 1))
        self.register_buffer("std", torch.ones(mels, 1))

    def raw(self, x: Tensor) -> Tensor:
        """Natural log of the mel power, not normalised: ``[N, samples]`` to ``[N, mels, T]``."""
        wave = x.to(torch.float32).unsqueeze(1) / self.full_scale
        real, imaginary = F.conv1d(wave, self.dft, stride=self.hop).chunk(2, dim=1)
        power = real * real + imaginary * imaginary
        return torch.log(torch.matmul(self.filters, power) + _FLOOR)

    def forward(self, x: Tensor) -> Tensor:
        """Raw waveform ``[N, samples]`` to float32 ``[N, mels, T]``, about zero mean, unit std."""
        return (self.raw(x) - self.mean) / self.std

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Fix each band's mean and deviation from representative waveforms ``[N, samples]``."""
        bands = self.raw(x)
        self.mean.copy_(bands.mean(dim=(0, 2)).unsqueeze(1))
        self.std.copy_(bands.std(dim=(0, 2)).unsqueeze(1).clamp_min(1e-3))

    def frames(self, samples: int) -> int:
        """How many frames come from ``samples``.

        Raises:
            DataError: Not even one.
        """
        frame = self.dft.shape[2]
        if samples < frame:
            raise DataError(
                f"waveforms of {samples} samples are shorter than a frame of {frame}; "
                f"take longer ones"
            )
        return (samples - frame) // self.hop + 1


def mel_filters(sample_rate_hz: int, frame: int, mels: int) -> Tensor:
    """Triangular filters from 20 Hz to the Nyquist frequency, float32 ``[mels, frame / 2 + 1]``.

    Source: S. Young et al., The HTK Book: mel(f) = 2595 log10(1 + f / 700).
    """
    low, high = (2595 * math.log10(1 + f / 700) for f in (20.0, sample_rate_hz / 2))
    points = torch.linspace(low, high, mels + 2, dtype=torch.float64)
    edges = 700 * (10 ** (points / 2595) - 1)
    bins = torch.arange(frame // 2 + 1, dtype=torch.float64) * sample_rate_hz / frame
    left, centre, right = (edges[i : i + mels].unsqueeze(1) for i in range(3))
    rise, fall = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return torch.minimum(rise, fall).clamp_min(0).to(torch.float32)


def _windowed_dft(frame: int) -> Tensor:
    """Hann-windowed cosines, then sines: float32 ``[frame + 2, 1, frame]``."""
    n = torch.arange(frame, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / frame)
    angle = 2 * math.pi * torch.arange(frame // 2 + 1, dtype=torch.float64).outer(n) / frame
    waves = torch.cat([torch.cos(angle), -torch.sin(angle)]) * window
    return waves.unsqueeze(1).to(torch.float32)
