"""Teachers: large, accurate, and never shipped; they take the student's raw input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edge_ll_export.data import InputSpec, input_spec
from edge_ll_export.models.backbones import Backbone, pretrained_minilm
from edge_ll_export.models.backbones.resnet import ResNetBackbone
from edge_ll_export.models.backbones.tcn import TcnBackbone
from edge_ll_export.models.logmel import LogMel
from edge_ll_export.models.seeding import seeded
from edge_ll_export.recipe import BackboneKind, Recipe


class ImageTeacher(nn.Module):
    """Four 3x3 convolutions with one halving, for small images.

    Args:
        spec: Of the images, ``[C, H, W]``.
        width: Channels of the first two convolutions; the others have twice as many.
        capacity: Number of logits.
    """

    def __init__(self, *, spec: InputSpec, width: int, capacity: int) -> None:
        super().__init__()
        self.full_scale = spec.full_scale
        inputs, height, breadth = spec.shape
        self.blocks = nn.Sequential(
            *_block(inputs, width, stride=1),
            *_block(width, width, stride=1),
            *_block(width, 2 * width, stride=2),
            *_block(2 * width, 2 * width, stride=1),
            nn.Flatten(),
            nn.Linear(2 * width * -(-height // 2) * -(-breadth // 2), capacity),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Raw images ``[N, C, H, W]`` to logits float32 ``[N, capacity]``."""
        logits: Tensor = self.blocks(x.to(torch.float32) / self.full_scale)
        return logits

    def calibrate(self, x: Tensor) -> None:
        """Nothing to fix from data: images have a known scale."""


class AudioTeacher(nn.Module):
    """2D convolutions over log-mel bands and time, then the mean over both.

    Args:
        spec: Of the waveforms, ``[samples]``.
        width: Channels of the first convolution; doubled twice after.
        capacity: Number of logits.
    """

    def __init__(self, *, spec: InputSpec, width: int, capacity: int) -> None:
        super().__init__()
        self.features = LogMel(sample_rate_hz=spec.sample_rate_hz, full_scale=spec.full_scale)
        self.blocks = nn.Sequential(
            *_block(1, width, stride=2),
            *_block(width, 2 * width, stride=2),
            *_block(2 * width, 4 * width, stride=2),
            *_block(4 * width, 4 * width, stride=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, capacity),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Raw waveforms ``[N, samples]`` to logits float32 ``[N, capacity]``."""
        logits: Tensor = self.blocks(self.features(x).unsqueeze(1))
        return logits

    def calibrate(self, x: Tensor) -> None:
        """Fix the normalisation of the log-mel bands from waveforms ``[N, samples]``."""
        self.features.calibrate(x)


class HeadTeacher(nn.Module):
    """A backbone of the student's family, and a head on its mean.

    Args:
        backbone: With a flat latent.
        head: Latents ``[N, D]`` to logits.
    """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Raw samples ``[N, ...]`` to logits float32 ``[N, capacity]``."""
        logits: Tensor = self.head(self.backbone(x))
        return logits

    def calibrate(self, x: Tensor) -> None:
        """Fix what the backbone takes from data."""
        self.backbone.calibrate(x)


AnyTeacher = ImageTeacher | AudioTeacher | HeadTeacher


def resnet_teacher(*, spec: InputSpec, width: int, capacity: int) -> HeadTeacher:
    """A residual network of two blocks at each of three resolutions.

    The stem brings large images down to 64 pixels or fewer.
    """
    stride = -(-max(spec.shape[1:]) // 64)
    channels = (width, width, width, 2 * width, 2 * width, 4 * width)
    backbone = ResNetBackbone(
        spec=spec, channels=channels, latent_channels=4 * width, stride=stride, pool=True
    )
    return HeadTeacher(backbone, nn.Linear(4 * width, capacity))


def window_teacher(*, spec: InputSpec, width: int, capacity: int) -> HeadTeacher:
    """A temporal convolutional network that sees the last 125 steps."""
    channels = (width, width, 2 * width, 2 * width, 2 * width)
    backbone = TcnBackbone(
        spec=spec, channels=channels, latent_channels=4 * width, stride=1, pool=True
    )
    return HeadTeacher(backbone, nn.Linear(4 * width, capacity))


def text_teacher(*, spec: InputSpec, width: int, capacity: int) -> HeadTeacher:
    """The whole pre-trained encoder, frozen, and a head with one hidden layer."""
    backbone = pretrained_minilm(spec=spec, pool=True)
    head = nn.Sequential(
        nn.Linear(backbone.latent_shape[0], width), nn.ReLU(), nn.Linear(width, capacity)
    )
    return HeadTeacher(backbone, head)


KINDS: dict[BackboneKind, Callable[..., AnyTeacher]] = {
    "conv": ImageTeacher,
    "mobilenet": resnet_teacher,
    "resnet": resnet_teacher,
    "dscnn": AudioTeacher,
    "dscnn1d": AudioTeacher,
    "tcn": window_teacher,
    "mlp": window_teacher,
    "minilm": text_teacher,
}
"""The teacher for each kind of student backbone."""


def build_teacher(recipe: Recipe) -> AnyTeacher:
    """The recipe's teacher with fresh weights from the recipe's seed.

    Raises:
        DataError: Pre-trained weights are not installed.
    """
    build = KINDS[recipe.student.backbone.kind]
    with seeded(recipe.seed + 2):
        return build(
            spec=input_spec(recipe), width=recipe.teacher.width, capacity=recipe.classes.capacity
        )


def _block(inputs: int, outputs: int, *, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
