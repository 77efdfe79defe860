"""A tail of 1x1 convolutions: mixes the channels at each position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_ll_export.models.tails.norm import keep_variance, sample_norm


class PointwiseTail(nn.Module):
    """Norm, 1x1 convolutions with ReLU, mean over the positions, then one linear map.

    Args:
        latent_shape: ``(C, T)`` or ``(C, H, W)``.
        hidden: Channels of each convolution, at least one.
        capacity: Number of logits.
    """

    def __init__(
        self, *, latent_shape: Sequence[int], hidden: Sequence[int], capacity: int
    ) -> None:
        super().__init__()
        sizes = [latent_shape[0], *hidden]
        self.mix = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in zip(sizes, hidden, strict=False))
        self.head = nn.Linear(sizes[-1], capacity)
        keep_variance(self.mix)

    def forward(self, z: Tensor) -> Tensor:
        """Latents ``[N, C, ...]`` to logits float32 ``[N, capacity]``."""
        h = sample_norm(z.flatten(2))
        for mix in self.mix:
            h = torch.relu(mix(h))
        logits: Tensor = self.head(h.mean(dim=2))
        return logits
