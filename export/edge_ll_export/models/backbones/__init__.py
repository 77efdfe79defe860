"""Backbones: raw input to latent, frozen on the device and exported whole.

Scaling, feature extraction and masks are part of the graph. Batch norms are frozen at export and
fold into the convolutions before them.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_ll_export import recipe as recipes
from edge_ll_export.data import InputSpec, input_spec
from edge_ll_export.models.backbones.base import Backbone
from edge_ll_export.models.backbones.conv import ConvBackbone
from edge_ll_export.models.backbones.dscnn import DsCnnBackbone
from edge_ll_export.models.backbones.dscnn1d import SeparableBackbone
from edge_ll_export.models.backbones.minilm import MiniLmBackbone
from edge_ll_export.models.backbones.mlp import MlpBackbone
from edge_ll_export.models.backbones.mobilenet import MobileNetBackbone
from edge_ll_export.models.backbones.remembered import Remembered
from edge_ll_export.models.backbones.resnet import ResNetBackbone
from edge_ll_export.models.backbones.tcn import TcnBackbone
from edge_ll_export.models.seeding import seeded
from edge_ll_export.pretrained import minilm_weights

__all__ = ["KINDS", "Backbone", "Remembered", "build_backbone", "pretrained_minilm"]


def pretrained_minilm(*, spec: InputSpec, layers: int = 6, pool: bool) -> MiniLmBackbone:
    """The first layers of the pre-trained encoder.

    Raises:
        DataError: The package with the weights is not installed.
    """
    backbone = MiniLmBackbone(spec=spec, layers=layers, pool=pool)
    backbone.load_bert(minilm_weights())
    return backbone


KINDS: dict[recipes.BackboneKind, Callable[..., Backbone]] = {
    "conv": ConvBackbone,
    "mobilenet": MobileNetBackbone,
    "resnet": ResNetBackbone,
    "dscnn": DsCnnBackbone,
    "dscnn1d": SeparableBackbone,
    "tcn": TcnBackbone,
    "mlp": MlpBackbone,
    "minilm": pretrained_minilm,
}
"""Each takes ``spec`` and the keys of :data:`edge_ll_export.recipe.BACKBONE_KEYS`."""


def build_backbone(recipe: recipes.Recipe) -> Backbone:
    """The recipe's backbone with fresh weights from the recipe's seed, or pre-trained ones.

    Raises:
        DataError: Pre-trained weights are not installed.
    """
    table = recipe.student.backbone
    keys = {key: getattr(table, key) for key in recipes.BACKBONE_KEYS[table.kind]}
    with seeded(recipe.seed):
        return KINDS[table.kind](spec=input_spec(recipe), **keys)
