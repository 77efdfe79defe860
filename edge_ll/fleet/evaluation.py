"""Measuring a tail on held-out samples through any engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_ll.bundle import Bundle
from edge_ll.engine.port import MASKED, Engine
from edge_ll.errors import DataError
from edge_ll.metrics import Counts

Float32 = npt.NDArray[np.float32]

Evaluate: TypeAlias = Callable[[Float32, Sequence[int]], Mapping[str, Counts]]
"""Counts per anchor group of the tail θ when only the given classes may be predicted."""

_BATCH = 256


def holdout_evaluator(
    engine: Engine, bundle: Bundle, x: npt.NDArray[Any], labels: npt.NDArray[np.int64]
) -> Evaluate:
    """An evaluator that runs the backbone once and then only tails.

    Args:
        engine: An engine on ``bundle`` that nobody else uses: its θ is replaced at every call.
        bundle: Names the anchor groups.
        x: Held-out raw inputs [N, *input].
        labels: Their classes, int64 [N].

    Raises:
        DataError: Inputs and labels do not pair up, or there are none.
    """
    if not len(x) or len(x) != len(labels):
        raise DataError(f"expected as many labels as inputs, got {len(labels)} for {len(x)}")
    parts = [engine.latents(x[at : at + _BATCH]) for at in range(0, len(x), _BATCH)]
    latents = np.concatenate(parts)
    groups = bundle.manifest.anchor_groups
    capacity = bundle.manifest.capacity

    def evaluate(theta: Float32, classes: Sequence[int]) -> dict[str, Counts]:
        mask = np.full(capacity, MASKED, np.float32)
        mask[list(classes)] = 0.0
        engine.set_theta(theta)
        logits = [engine.logits(latents[at : at + _BATCH]) for at in range(0, len(x), _BATCH)]
        right = (np.concatenate(logits) + mask).argmax(axis=1) == labels
        counts: dict[str, Counts] = {}
        for name, members in groups.items():
            here = np.isin(labels, members)
            counts[name] = Counts(int(right[here].sum()), int(here.sum()))
        return counts

    return evaluate
