"""A tail of depthwise-separable blocks: looks at neighbouring positions, then mixes channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_ll_export.models.tails.norm import keep_variance, sample_norm

_KERNELS = {1: (9, 1), 2: (3, 3)}  # by spatial axes: as many taps either way


class SeparableTail(nn.Module):
    """Norm, depthwise and 1x1 convolutions with ReLU, mean over positions, one linear map.

    The blocks of DS-CNN (Zhang et al., Hello Edge, 2017) without the batch norms, whose statistics
    would have to be learned or frozen on the device: the latent is normalised once instead.

    Args:
        latent_shape: ``(C, T)``, then nine taps over time, or ``(C, H, W)``, then 3x3.
        hidden: Channels after each block, at least one.
        capacity: Number of logits.
    """

    def __init__(
        self, *, latent_shape: Sequence[int], hidden: Sequence[int], capacity: int
    ) -> None:
        super().__init__()
        channels, *axes = latent_shape
        kernel = _KERNELS[len(axes)]
        padding = kernel[0] // 2, kernel[1] // 2
        sizes = [channels, *hidden]
        # Two spatial axes always: not every engine has a gradient for depthwise ones over time.
        self.depthwise = nn.ModuleList(
            nn.Conv2d(a, a, kernel, padding=padding, groups=a) for a in sizes[:-1]
        )
        self.pointwise = nn.ModuleList(
            nn.Conv2d(a, b, 1) for a, b in zip(sizes, hidden, strict=False)
        )
        self.head = nn.Linear(sizes[-1], capacity)
        keep_variance(self.depthwise)
        keep_variance(self.pointwise)

    def forward(self, z: Tensor) -> Tensor:
        """Latents ``[N, C, ...]`` to logits float32 ``[N, capacity]``."""
        h = sample_norm(z if z.dim() == 4 else z.unsqueeze(3))
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            h = torch.relu(pointwise(torch.relu(depthwise(h))))
        logits: Tensor = self.head(h.mean(dim=(2, 3)))
        return logits
