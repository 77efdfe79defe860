"""Keeping activations in scale, in the same way in training and in use.

Batch statistics are out of place on a device: batches are small, and their classes come in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sample_norm(z: Tensor) -> Tensor:
    """Each sample ``[N, C, ...]`` to zero mean and unit variance over all its numbers.

    Group norm with one group (Wu and He, 2018), without gain and bias: the convolution that
    follows has both. On a latent, which is frozen, it needs no gradient.
    """
    return F.group_norm(z, 1)


def keep_variance(layers: nn.ModuleList) -> None:
    """Fresh weights of convolutions before ReLUs (He et al., 2015): no norm between them needed."""
    for name, parameter in layers.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.zeros_(parameter)


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
