"""A tail of one transformer block, for the token states of a text encoder or any sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_ll_export.models.tails.norm import ChannelNorm

_HEADS = 4
_AWAY = -1e9


class TransformerTail(nn.Module):
    """Projection, one pre-norm block (Xiong et al., 2020), mean over the tokens, one linear map.

    Tokens whose state is all zeros are padding: they are neither attended to nor averaged.

    Args:
        latent_shape: ``(C, T)``, the size of a state and how many tokens there are.
        hidden: Width of the block, a multiple of four, then of its inner layer.
        capacity: Number of logits.
    """

    def __init__(
        self, *, latent_shape: Sequence[int], hidden: Sequence[int], capacity: int
    ) -> None:
        super().__init__()
        states, _tokens = latent_shape
        width, inner = hidden
        self.project = nn.Linear(states, width)
        self.attention_norm = ChannelNorm(width)
        # Without bias: softmax cancels that of the keys, and AdamW would turn the rounding errors
        # of a gradient that is zero into steps.
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width)
        self.inner_norm = ChannelNorm(width)
        self.inner = nn.Linear(width, inner)
        self.outer = nn.Linear(inner, width)
        self.head = nn.Linear(width, capacity)

    def forward(self, z: Tensor) -> Tensor:
        """Latents ``[N, C, T]`` to logits float32 ``[N, capacity]``."""
        present = (z.abs().sum(dim=1) > 0).to(z.dtype)
        tokens = z.transpose(1, 2).flatten(0, 1)  # of all samples in one axis, [N * T, C]
        h = self.project(tokens)
        h = h + self._attend(self.attention_norm(h), present)
        h = h + self.outer(torch.relu(self.inner(self.inner_norm(h))))
        count = present.sum(dim=1, keepdim=True).clamp_min(1.0)
        share = (present / count).unsqueeze(1)
        mean = share @ h.reshape(*present.shape, h.shape[1])
        logits: Tensor = self.head(mean.flatten(1))
        return logits

    def _attend(self, h: Tensor, present: Tensor) -> Tensor:
        """Multi-head self-attention (Vaswani et al., 2017) on [N * T, width]."""
        width = h.shape[1]
        parts = (*present.shape, 3 * _HEADS, width // _HEADS)
        heads = self.attention(h).reshape(parts).transpose(1, 2)
        query, key, value = (heads[:, at : at + _HEADS] for at in (0, _HEADS, 2 * _HEADS))
        scores = query @ key.transpose(2, 3) * (width // _HEADS) ** -0.5
        scores = scores + ((1.0 - present) * _AWAY)[:, None, None, :]
        mixed = torch.softmax(scores, dim=3) @ value
        attended: Tensor = self.attended(mixed.transpose(1, 2).flatten(2).flatten(0, 1))
        return attended
