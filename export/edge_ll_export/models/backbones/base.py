"""What all backbones have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BATCH = 256


class Backbone(nn.Module):
    """Raw input to latent; see each kind for the shapes that it takes and gives.

    Attributes:
        latent_shape: Of one latent, without the batch axis.
        frozen: Whether its weights come ready-made: they are never trained here.
    """

    latent_shape: tuple[int, ...]
    frozen = False

    def calibrate(self, x: Tensor) -> None:
        """Fix what is taken from raw training samples ``[N, ...]``; a kind may need nothing."""

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents float32 ``[N, *latent_shape]`` of any number of raw samples, in parts."""
        return torch.cat([self(part) for part in torch.split(x, _BATCH)])
