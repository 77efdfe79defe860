"""MiniLM for text: a small pre-trained transformer encoder of the BERT family.

Sources: W. Wang et al., MiniLM: Deep Self-Attention Distillation, NeurIPS 2020; J. Devlin et al.,
BERT, NAACL 2019; N. Reimers and I. Gurevych, Sentence-BERT, EMNLP 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_ll.tokenizer import PADDING
from edge_ll_export.data.dataset import InputSpec
from edge_ll_export.models.backbones.base import Backbone

_MASKED = -1e9  # added to a score: its weight becomes zero
_EPSILON = 1e-12  # BERT's layer norms
_BATCH = 128


class MiniLmBackbone(Backbone):
    """Token ids to the states of the tokens, or to their mean.

    Padding takes no part: no token attends to it, it counts in no mean, and its states are zero.

    Args:
        spec: Of the token ids, ``[T]``.
        layers: How many transformer layers, the first ones of the pre-trained encoder.
        pool: Whether the latent is the mean over the tokens.
        vocabulary: Number of token ids.
        width: Size of a token's state.
        hidden: Size of the layer inside each block.
        heads: Of the attention.
        positions: Longest text that has an embedding for each position.

    Raises:
        ValueError: Texts are longer than there are positions.
    """

    frozen = True

    def __init__(
        self,
        *,
        spec: InputSpec,
        layers: int,
        pool: bool,
        vocabulary: int = 30_522,
        width: int = 384,
        hidden: int = 1536,
        heads: int = 12,
        positions: int = 512,
    ) -> None:
        super().__init__()
        (length,) = spec.shape
        if length > positions:
            raise ValueError(f"texts of {length} tokens; this encoder takes at most {positions}")
        self.pool = pool
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(positions, width)
        self.kinds = nn.Embedding(2, width)  # BERT's first or second sentence; here the first
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.layers = nn.ModuleList(
            TransformerLayer(width=width, hidden=hidden, heads=heads) for _ in range(layers)
        )
        self.latent_shape = (width,) if pool else (width, length)
        self.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids int64 ``[N, T]`` to float32 ``[N, D, T]``, or ``[N, D]``."""
        present = (x != PADDING).to(torch.float32)
        bias = ((1.0 - present) * _MASKED)[:, None, None, :]
        h: Tensor = self.words(x) + self.places.weight[: x.shape[1]] + self.kinds.weight[0]
        h = self.norm(h)
        for layer in self.layers:
            h = layer(h, bias)
        h = h * present.unsqueeze(2)
        if self.pool:
            return h.sum(dim=1) / present.sum(dim=1, keepdim=True).clamp_min(1.0)
        return h.transpose(1, 2)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents of any number of texts: short ones together, without the padding behind them."""
        places = torch.arange(1, x.shape[1] + 1)
        lengths = (places * (x != PADDING)).amax(dim=1).clamp_min(1)
        latents = torch.zeros((len(x), *self.latent_shape))
        for rows in torch.split(lengths.argsort(stable=True), _BATCH):
            part = self(x[rows, : int(lengths[rows].max())])
            if self.pool:
                latents[rows] = part
            else:
                latents[rows, :, : part.shape[2]] = part
        return latents

    def load_bert(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Take the weights of a BERT checkpoint, by its names.

        Raises:
            KeyError: A tensor is missing.
            RuntimeError: A tensor has another shape.
        """
        parts = [
            ("words", "embeddings.word_embeddings"),
            ("places", "embeddings.position_embeddings"),
            ("kinds", "embeddings.token_type_embeddings"),
            ("norm", "embeddings.LayerNorm"),
        ]
        for i in range(len(self.layers)):
            parts += [(f"layers.{i}.{a}", f"encoder.layer.{i}.{b}") for a, b in _LAYER]
        own = {name for name, _ in self.named_parameters()}
        state = {
            f"{ours}.{kind}": torch.from_numpy(tensors[f"{theirs}.{kind}"])
            for ours, theirs in parts
            for kind in ("weight", "bias")
            if f"{ours}.{kind}" in own
        }
        self.load_state_dict(state)


_LAYER = (
    ("query", "attention.self.query"),
    ("key", "attention.self.key"),
    ("value", "attention.self.value"),
    ("mix", "attention.output.dense"),
    ("attention_norm", "attention.output.LayerNorm"),
    ("widen", "intermediate.dense"),
    ("narrow", "output.dense"),
    ("norm", "output.LayerNorm"),
)


class TransformerLayer(nn.Module):
    """Self-attention, then two linear layers; a norm after each (BERT's order)."""

    def __init__(self, *, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=_EPSILON)
        self.widen = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=_EPSILON)

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        """States ``[N, T, D]`` and what is added to the scores, ``[N, 1, 1, T]``."""
        query, key, value = self._split(self.query(h)), self._split(self.key(h)), self.value(h)
        scores = query @ key.transpose(2, 3) / math.sqrt(self.size) + bias
        seen = torch.softmax(scores, dim=-1) @ self._split(value)
        h = self.attention_norm(h + self.mix(seen.transpose(1, 2).flatten(2)))
        inner: Tensor = self.norm(h + self.narrow(F.gelu(self.widen(h))))
        return inner

    def _split(self, h: Tensor) -> Tensor:
        """``[N, T, D]`` to ``[N, heads, T, D / heads]``."""
        return h.reshape(*h.shape[:2], self.heads, self.size).transpose(1, 2)
