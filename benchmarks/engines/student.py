"""The student that memory is measured with: the recipe fsdd's DS-CNN and its tail, untrained.

What it has learned changes neither its memory nor its time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from edge_ll.config import load
from edge_ll_export.models.backbones import build_backbone
from edge_ll_export.models.tails import build_tail
from edge_ll_export.recipe import Recipe

RECIPE = Path(__file__).parents[2] / "export" / "recipes" / "fsdd.toml"


def recipe() -> Recipe:
    """The recipe of the student."""
    return load(RECIPE, Recipe)


def build_student(waveforms: npt.NDArray[Any]) -> tuple[nn.Module, nn.Module]:
    """Backbone and tail; the features are normalised on these waveforms, int16 [n, samples]."""
    table = recipe()
    backbone = build_backbone(table)
    backbone.calibrate(torch.from_numpy(waveforms))
    return backbone.eval(), build_tail(table, backbone.latent_shape)
