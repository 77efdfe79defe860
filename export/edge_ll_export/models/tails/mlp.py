"""Linear and MLP tails: the flat latent to logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MlpTail(nn.Module):
    """Linear layers with ReLU between them on the flat latent; without ``hidden`` one linear map.

    Args:
        latent_shape: Of one latent; flattened.
        hidden: Sizes of the hidden layers, maybe none.
        capacity: Number of logits.
    """

    def __init__(
        self, *, latent_shape: Sequence[int], hidden: Sequence[int], capacity: int
    ) -> None:
        super().__init__()
        sizes = [math.prod(latent_shape), *hidden]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(sizes, [*hidden, capacity], strict=True)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Latents ``[N, ...]`` to logits float32 ``[N, capacity]``."""
        h = z.flatten(1)
        for layer in self.layers[:-1]:
            h = torch.relu(layer(h))
        logits: Tensor = self.layers[-1](h)
        return logits
