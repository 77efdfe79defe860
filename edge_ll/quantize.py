"""Latents as int8: a quarter of the memory of a replay buffer, and of the bytes in a bundle.

Affine and per channel: ``latent = (int8 - zero) * scale``; the channel is a latent's first axis.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

_LOW, _HIGH = -128, 127


class LatentQuantizer(NamedTuple):
    """How latents are rounded.

    Attributes:
        scale: float32 [C], step size per channel.
        zero: int8 [C], the code of the value zero.
    """

    scale: Float32
    zero: Int8

    @classmethod
    def fit(cls, latents: Float32, *, headroom: float = 0.5) -> LatentQuantizer:
        """Cover the range of ``latents`` float32 [N, C, ...], widened for data not seen yet."""
        axes = (0, *range(2, latents.ndim))
        low = np.minimum(latents.min(axis=axes), 0.0)
        high = np.maximum(latents.max(axis=axes), 0.0)
        # A channel that is silent on the known classes may speak on new ones.
        floor = 0.1 * float(np.max(high - low)) + 1e-6
        scale = np.maximum((high - low) * (1 + headroom), floor) / (_HIGH - _LOW)
        zero = np.clip(np.round(_LOW - low * (1 + headroom) / scale), _LOW, _HIGH)
        return cls(scale.astype(np.float32), zero.astype(np.int8))

    def encode(self, latents: Float32) -> Int8:
        """int8 of the same shape; values out of range are clipped."""
        scale, zero = self._broadcast(latents.ndim)
        return np.clip(np.round(latents / scale) + zero, _LOW, _HIGH).astype(np.int8)

    def decode(self, codes: Int8) -> Float32:
        """float32 of the same shape."""
        scale, zero = self._broadcast(codes.ndim)
        return (codes.astype(np.float32) - zero) * scale

    def _broadcast(self, ndim: int) -> tuple[Float32, Float32]:
        shape = (-1, *([1] * (ndim - 2)))
        return self.scale.reshape(shape), self.zero.reshape(shape).astype(np.float32)
