"""The replay buffer: int8 latents of earlier samples, balanced over the classes.

Insertion follows class-balancing reservoir sampling (Chrysakis and Moens, ICML 2020): while the
buffer is full, a sample of a class that was never the largest takes the place of one of the
largest; any other class is a reservoir, in which each of its samples has the same chance. An
insert touches one slot; nothing iterates over the buffer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_ll.engine.port import Float32, Int64
from edge_ll.quantize import LatentQuantizer


class BufferState(NamedTuple):
    """What a buffer holds: codes int8 [n, *latent], labels int64 [n], seen int64 [C]."""

    codes: npt.NDArray[np.int8]
    labels: Int64
    seen: Int64


class ReplayBuffer:
    """At most ``entries`` latents with their labels.

    Args:
        entries: Number of slots; 0 makes a buffer that keeps nothing.
        latent_shape: Shape of one latent.
        classes: Number of classes that may come.
        quantizer: How latents are rounded to int8.
        rng: Where every choice comes from: same seed, same buffer.
    """

    def __init__(
        self,
        entries: int,
        latent_shape: tuple[int, ...],
        *,
        classes: int,
        quantizer: LatentQuantizer,
        rng: np.random.Generator,
    ) -> None:
        self._codes = np.zeros((entries, *latent_shape), np.int8)
        self._labels = np.zeros(entries, np.int64)
        self._seen = np.zeros(classes, np.int64)
        self._slots: list[list[int]] = [[] for _ in range(classes)]
        self._size = 0
        self._quantizer = quantizer
        self._rng = rng

    def __len__(self) -> int:
        return self._size

    @property
    def size_bytes(self) -> int:
        """Memory of latents and labels at full size."""
        return self._codes.nbytes + self._labels.nbytes

    @property
    def class_counts(self) -> list[int]:
        """Entries per class."""
        return [len(slots) for slots in self._slots]

    def add(self, latents: Float32, labels: Int64) -> None:
        """Offer samples: float32 [N, *latent] and int64 [N]."""
        codes: npt.NDArray[Any] = self._quantizer.encode(latents) if len(latents) else latents
        for code, label in zip(codes, labels.tolist(), strict=True):
            self._seen[label] += 1
            slot = self._slot_for(label)
            if slot is not None:
                self._codes[slot] = code
                self._labels[slot] = label

    def sample(self, n: int) -> tuple[Float32, Int64]:
        """``n`` entries drawn uniformly with replacement; none where the buffer is empty."""
        n = n if self._size else 0
        chosen = self._rng.integers(0, max(self._size, 1), n)
        return self._quantizer.decode(self._codes[chosen]), self._labels[chosen]

    def state(self) -> BufferState:
        """A copy of what the buffer holds."""
        kept = slice(self._size)
        return BufferState(self._codes[kept].copy(), self._labels[kept].copy(), self._seen.copy())

    def restore(self, state: BufferState) -> None:
        """Hold what ``state`` holds; where the room is too small, as many of each class."""
        room = len(self._slots)
        shared = min(room, len(state.seen))
        self._seen[:] = 0
        self._seen[:shared] = state.seen[:shared]
        rank = np.zeros(len(state.labels), np.int64)
        for label in range(room):
            members = np.flatnonzero(state.labels == label)
            rank[members] = np.arange(len(members))
        rank[state.labels >= room] = len(state.labels)
        order = np.argsort(rank, kind="stable")[: len(self._labels)]
        kept = np.sort(order[state.labels[order] < room])
        self._size = len(kept)
        self._codes[: self._size] = state.codes[kept]
        self._labels[: self._size] = state.labels[kept]
        self._slots = [
            np.flatnonzero(self._labels[: self._size] == label).tolist() for label in range(room)
        ]

    def _slot_for(self, label: int) -> int | None:
        """The slot that a sample of ``label`` may take, already booked to its class."""
        own = self._slots[label]
        if self._size < len(self._labels):
            own.append(self._size)
            self._size += 1
            return self._size - 1
        if not self._size:
            return None
        largest = max(range(len(self._slots)), key=lambda c: len(self._slots[c]))
        # A class that has lost samples was once the largest; from then on it is a reservoir.
        reservoir = own and int(self._seen[label]) - 1 > len(own)
        if not reservoir and len(own) < len(self._slots[largest]):
            donors = self._slots[largest]
            at = int(self._rng.integers(len(donors)))
            donors[at], donors[-1] = donors[-1], donors[at]
            own.append(donors.pop())
            return own[-1]
        at = int(self._rng.integers(int(self._seen[label])))
        return own[at] if at < len(own) else None
