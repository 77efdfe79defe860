"""Tails: latent to logits, the part that devices train.

A training step is exported as plain operators with its gradient, so tails keep to operators that
both engines can differentiate: no dropout, no batch statistics, nothing in place, no fused layer
norm.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_ll_export.models.seeding import seeded
from edge_ll_export.models.tails.mlp import MlpTail
from edge_ll_export.models.tails.pointwise import PointwiseTail
from edge_ll_export.models.tails.separable import SeparableTail
from edge_ll_export.models.tails.transformer import TransformerTail
from edge_ll_export.recipe import Recipe, TailKind

__all__ = ["AnyTail", "MlpTail", "PointwiseTail", "SeparableTail", "TransformerTail", "build_tail"]

AnyTail = MlpTail | PointwiseTail | SeparableTail | TransformerTail

TAILS: dict[TailKind, type[AnyTail]] = {
    "linear": MlpTail,
    "mlp": MlpTail,
    "pointwise": PointwiseTail,
    "separable": SeparableTail,
    "transformer": TransformerTail,
}


def build_tail(recipe: Recipe, latent_shape: Sequence[int]) -> AnyTail:
    """The recipe's tail for latents of ``latent_shape``, with weights from the recipe's seed.

    The recipe has checked that the tail takes latents with the axes of its backbone.
    """
    table = recipe.student.tail
    with seeded(recipe.seed + 1):
        return TAILS[table.kind](
            latent_shape=latent_shape, hidden=table.hidden, capacity=recipe.classes.capacity
        )
