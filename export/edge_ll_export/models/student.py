"""The student: a backbone that is frozen on devices, then a tail that learns there."""

from __future__ import annotations

from torch import Tensor, nn

from edge_ll_export.models.backbones import Backbone, build_backbone
from edge_ll_export.models.tails import AnyTail, build_tail
from edge_ll_export.recipe import Recipe


class Student(nn.Module):
    """Backbone, then tail; both are exported on their own.

    Args:
        backbone: Raw input to latent.
        tail: Latent to logits.
    """

    def __init__(self, backbone: Backbone, tail: AnyTail) -> None:
        super().__init__()
        self.backbone = backbone
        self.tail = tail

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one latent, without the batch axis."""
        return self.backbone.latent_shape

    def forward(self, x: Tensor) -> Tensor:
        """Raw input ``[N, ...]`` to logits float32 ``[N, capacity]``."""
        logits: Tensor = self.tail(self.backbone(x))
        return logits

    def calibrate(self, x: Tensor) -> None:
        """Fix what the backbone takes from data; see the backbone."""
        self.backbone.calibrate(x)


def build_student(recipe: Recipe) -> Student:
    """The recipe's student with fresh weights from the recipe's seed."""
    backbone = build_backbone(recipe)
    return Student(backbone, build_tail(recipe, backbone.latent_shape))
