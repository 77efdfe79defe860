"""Tails: latent to logits, the part that devices train.

A training step is exported as plain operators with its gradient, so tails keep to operators with
simple ones: no dropout, no batch statistics, nothing in place, no fused layer norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_ll_export.models.seeding import seeded
from edge_ll_export.recipe import Recipe


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


class ChannelNorm(nn.Module):
    """Layer norm over the last axis in plain operators (Ba et al., 2016).

    The fused operator has no gradient in every engine that trains tails.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., channels]`` position by position."""
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = (centred * centred).mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * self.gain + self.bias


class PointwiseTail(nn.Module):
    """1x1 convolutions over the channels, mean over the positions, then one linear map.

    A 1x1 convolution is written as a matrix product on the transposed latent: its gradient is
    two matrix products, which every runtime does fast. Blocks that keep their size are residual.

    Args:
        latent_shape: ``(C, T)``.
        hidden: Channels of each block, at least one.
        capacity: Number of logits.
    """

    def __init__(
        self, *, latent_shape: Sequence[int], hidden: Sequence[int], capacity: int
    ) -> None:
        super().__init__()
        channels, _positions = latent_shape
        sizes = [channels, *hidden]
        self.mix = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, hidden, strict=False))
        self.norms = nn.ModuleList(ChannelNorm(size) for size in hidden)
        self.head = nn.Linear(sizes[-1], capacity)

    def forward(self, z: Tensor) -> Tensor:
        """Latents ``[N, C, T]`` to logits float32 ``[N, capacity]``."""
        h = z.transpose(1, 2)
        for mix, norm in zip(self.mix, self.norms, strict=True):
            mixed = torch.relu(norm(mix(h)))
            h = h + mixed if mixed.shape[-1] == h.shape[-1] else mixed
        logits: Tensor = self.head(h.mean(dim=1))
        return logits


AnyTail = MlpTail | PointwiseTail


def build_tail(recipe: Recipe, latent_shape: Sequence[int]) -> AnyTail:
    """The recipe's tail for latents of ``latent_shape``, with weights from the recipe's seed.

    Raises:
        ValueError: A pointwise tail is given a latent without positions.
    """
    table = recipe.student.tail
    if table.kind == "pointwise" and len(latent_shape) != 2:
        raise ValueError(
            f"a pointwise tail needs latents [C, T], got {list(latent_shape)}; "
            f"take a linear or mlp tail, or a dscnn backbone"
        )
    kind = PointwiseTail if table.kind == "pointwise" else MlpTail
    with seeded(recipe.seed + 1):
        return kind(
            latent_shape=latent_shape, hidden=table.hidden, capacity=recipe.classes.capacity
        )
