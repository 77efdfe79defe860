"""Standardisation as a part of the graph: each channel to zero mean and unit deviation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """Raw samples to float32, each channel shifted and scaled by constants.

    The constants are fixed once, from training samples, and travel in the exported graph.

    Args:
        channels: Number of channels.
        axis: Of the channels in a batch; 1 in images ``[N, C, H, W]``, 2 in windows
            ``[N, T, C]``.
        axes: Of a batch, 4 and 3 in these.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, *, axis: int, axes: int) -> None:
        super().__init__()
        shape = [channels if i == axis else 1 for i in range(1, axes)]
        self._others = [i for i in range(axes) if i != axis]
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Raw ``[N, ...]`` to float32 of the same shape."""
        return (x.to(torch.float32) - self.mean) / self.std

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Take mean and deviation of each channel from raw samples ``[N, ...]``.

        A channel that never changes keeps a deviation of one: it becomes zero.
        """
        values = x.to(torch.float64)
        mean = values.mean(dim=self._others)
        std = values.std(dim=self._others)
        self.mean.copy_(mean.view_as(self.mean))
        self.std.copy_(torch.where(std > 1e-6, std, 1.0).view_as(self.std))
