"""A recipe: everything that decides one training run, read from one TOML file.

The same recipe and seed give the same student. Every number that matters is here with its
unit in its name, so a newcomer can read a run from top to bottom::

    from edge_ll.config import load
    recipe = load(Path("export/recipes/digits.toml"), Recipe)
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta
from msgspec.structs import fields

from edge_ll.config import Section
from edge_ll_export.data.dataset import InputKind

Count = Annotated[int, Meta(ge=1)]
ClassId = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0.0, lt=1.0)]
Positive = Annotated[float, Meta(gt=0.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
# Plain literals, not Annotated: so a misspelt choice is answered with the nearest one.
DatasetName = Literal["digits", "fsdd", "cifar10", "clinc150", "file"]
BackboneKind = Literal["conv", "mobilenet", "resnet", "dscnn", "dscnn1d", "tcn", "mlp", "minilm"]
TailKind = Literal["linear", "mlp", "pointwise", "separable", "transformer"]
LatentAxes = Literal["D", "CT", "CHW"]
"""Flat; channels over time, or states of tokens; channels over a map."""

INPUT_KINDS: dict[DatasetName, InputKind] = {
    "digits": "image",
    "fsdd": "waveform",
    "cifar10": "image",
    "clinc150": "text",
}
BACKBONES: dict[InputKind, tuple[BackboneKind, ...]] = {
    "image": ("conv", "mobilenet", "resnet"),
    "waveform": ("dscnn", "dscnn1d"),
    "window": ("tcn", "mlp"),
    "text": ("minilm",),
}
BACKBONE_KEYS: dict[BackboneKind, tuple[str, ...]] = {
    "conv": ("channels", "latent_channels"),
    "mobilenet": ("channels", "latent_channels", "stride", "width", "pool"),
    "resnet": ("channels", "latent_channels", "stride", "pool"),
    "dscnn": ("channels", "latent_channels", "pool"),
    "dscnn1d": ("channels", "latent_channels"),
    "tcn": ("channels", "latent_channels", "stride", "pool"),
    "mlp": ("channels", "latent_channels"),
    "minilm": ("layers", "pool"),
}
TAIL_AXES: dict[TailKind, tuple[LatentAxes, ...]] = {
    "linear": ("D", "CT", "CHW"),
    "mlp": ("D", "CT", "CHW"),
    "pointwise": ("CT", "CHW"),
    "separable": ("CT", "CHW"),
    "transformer": ("CT",),
}


class Classes(Section, frozen=True, kw_only=True):
    """Which classes the server knows, which the devices will meet, and room for all of them."""

    base: Annotated[
        tuple[ClassId, ...], Meta(min_length=1, description="Classes of the pre-training")
    ]
    experiences: Annotated[
        tuple[tuple[ClassId, ...], ...],
        Meta(description="New classes that devices meet, one group after the other"),
    ]
    capacity: Annotated[int, Meta(ge=2, description="Outputs of the tail, used or still free")]
    labels: Annotated[tuple[str, ...], Meta(description="A name for each of the outputs")]

    def __post_init__(self) -> None:
        problems = []
        if len(self.labels) != self.capacity:
            problems.append(
                f"labels: expected {self.capacity} (the capacity), got {len(self.labels)}"
            )
        if len(set(self.labels)) != len(self.labels):
            problems.append("labels: each name may stand once")
        everyone = [*self.base, *self.new]
        if outside := sorted({c for c in everyone if c >= self.capacity}):
            problems.append(f"classes {outside} do not fit a capacity of {self.capacity}")
        if twice := sorted({c for c in everyone if everyone.count(c) > 1}):
            problems.append(f"classes {twice} stand twice; base and experiences must be disjoint")
        if any(not group for group in self.experiences):
            problems.append("experiences: an experience needs at least one class")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def new(self) -> tuple[int, ...]:
        """The classes of all experiences, in the order devices meet them."""
        return tuple(c for group in self.experiences for c in group)


class SplitShares(Section, frozen=True, kw_only=True):
    """How each class is divided; what remains is ``train`` (base) or ``stream`` (new classes)."""

    test: Annotated[Share, Meta(description="All classes: the figures we publish")]
    anchors: Annotated[Share, Meta(description="All classes: measures forgetting on devices")]
    holdout: Annotated[Share, Meta(description="All classes: the server's gate on merged weights")]
    traffic: Annotated[Share, Meta(description="Base classes: what devices see unlabelled")]
    held_groups: Annotated[
        tuple[str, ...], Meta(description="Groups (speakers) never heard with labels")
    ] = ()

    def __post_init__(self) -> None:
        total = self.test + self.anchors + self.holdout + self.traffic
        if total >= 1.0:
            raise ValueError(
                f"test + anchors + holdout + traffic must leave something to train on: "
                f"expected a sum below 1, got {total:g}"
            )


class DataFile(Section, frozen=True, kw_only=True):
    """The user's own data, for the data set ``file``; see :mod:`edge_ll_export.data.file`."""

    path: Annotated[str, Meta(min_length=1, description="An .npz file with x, y and maybe group")]
    kind: Annotated[InputKind, Meta(description="What a sample is")]
    shape: Annotated[
        tuple[Count, ...], Meta(min_length=1, max_length=3, description="Of one sample")
    ]
    sample_rate_hz: Annotated[int, Meta(ge=0, description="Of waveforms")] = 0

    def __post_init__(self) -> None:
        axes = {"image": "C, H, W", "waveform": "samples", "window": "T, C", "text": "T"}[self.kind]
        if len(self.shape) != axes.count(",") + 1:
            raise ValueError(
                f"shape: expected [{axes}] for kind {self.kind!r}, got {list(self.shape)}"
            )
        if self.kind == "text" and not 3 <= self.shape[0] <= 512:
            raise ValueError(f"shape: texts take 3 to 512 token ids, got {self.shape[0]}")
        if (self.kind == "waveform") != (self.sample_rate_hz > 0):
            raise ValueError(
                f"sample_rate_hz: waveforms need it and nothing else has it; "
                f"got {self.sample_rate_hz} for kind {self.kind!r}"
            )


class ImageAugment(Section, frozen=True, kw_only=True):
    """Random small changes to images; every value is the largest change, 0 switches it off."""

    max_rotation_deg: Annotated[float, Meta(ge=0.0, le=45.0)] = 0.0
    max_shift_px: NonNegative = 0.0
    max_scale: Annotated[Share, Meta(description="0.1 zooms between 0.9 and 1.1")] = 0.0
    max_noise: Annotated[
        Share, Meta(description="Largest noise deviation, as a share of full scale")
    ] = 0.0
    mirror: Annotated[bool, Meta(description="Half of the images, left to right")] = False


class AudioAugment(Section, frozen=True, kw_only=True):
    """Random small changes to waveforms; every value is the largest change, 0 switches it off."""

    max_shift_s: NonNegative = 0.0
    max_gain_db: NonNegative = 0.0
    max_noise: Annotated[
        Share, Meta(description="Largest noise deviation, as a share of the clip's RMS")
    ] = 0.0


class WindowAugment(Section, frozen=True, kw_only=True):
    """Random small changes to sensor windows; every value is the largest change, 0 is off.

    Source: T. T. Um et al., Data Augmentation of Wearable Sensor Data, ICMI 2017.
    """

    max_scale: Annotated[Share, Meta(description="0.1 multiplies by 0.9 to 1.1")] = 0.0
    max_noise: Annotated[
        Share, Meta(description="Largest noise deviation, as a share of each sensor's deviation")
    ] = 0.0


class Augment(Section, frozen=True, kw_only=True):
    """Augmentation of the pre-training; the table that fits the data set is used.

    Text has none.
    """

    image: ImageAugment = ImageAugment()
    audio: AudioAugment = AudioAugment()
    window: WindowAugment = WindowAugment()


class Fitting(Section, frozen=True, kw_only=True):
    """One training run: AdamW, one warm-up, cosine decay to zero."""

    epochs: Annotated[int, Meta(ge=1, description="Passes over the training split")]
    batch: Annotated[int, Meta(ge=2, description="Samples per optimizer step")]
    lr: Annotated[float, Meta(gt=0.0, description="Peak learning rate")]
    weight_decay: Annotated[float, Meta(ge=0.0, description="Decoupled weight decay")] = 0.0


class Teacher(Section, frozen=True, kw_only=True):
    """The large network: accurate, never shipped."""

    width: Annotated[
        int,
        Meta(
            ge=4, description="Channels of its first block, doubled after; for text, hidden units"
        ),
    ]
    fit: Fitting


class Backbone(Section, frozen=True, kw_only=True):
    """The frozen part of the student: raw input to latent.

    Each kind takes the keys that :data:`BACKBONE_KEYS` names; the others stay at their defaults.
    """

    kind: BackboneKind
    channels: Annotated[
        tuple[Count, ...],
        Meta(description="Channels of the stem and of each block before the last"),
    ] = ()
    latent_channels: Annotated[int, Meta(ge=0, description="Channels of the latent")] = 0
    stride: Annotated[Count, Meta(description="Step of the stem")] = 1
    width: Annotated[Positive, Meta(description="Multiplies the channels")] = 1.0
    layers: Annotated[
        int, Meta(ge=1, le=6, description="Layers of the pre-trained encoder that are used")
    ] = 6
    pool: Annotated[bool, Meta(description="The latent is the mean over its positions")] = False

    def __post_init__(self) -> None:
        allowed = {"kind", *BACKBONE_KEYS[self.kind]}
        default = {field.name: field.default for field in fields(Backbone)}
        foreign = [k for k in default if k not in allowed and getattr(self, k) != default[k]]
        if foreign:
            takes = ", ".join(BACKBONE_KEYS[self.kind])
            raise ValueError(f"{foreign[0]}: a {self.kind} backbone has none; it takes {takes}")
        for key in {"channels", "latent_channels"} & allowed:
            if not getattr(self, key):
                raise ValueError(f"{key}: missing; a {self.kind} backbone needs it")

    @property
    def latent_axes(self) -> LatentAxes:
        """What the axes of the latent are."""
        if self.pool or self.kind in {"conv", "mlp"}:
            return "D"
        return "CT" if self.kind in {"dscnn1d", "tcn", "minilm"} else "CHW"


class Tail(Section, frozen=True, kw_only=True):
    """The part of the student that devices train.

    ``linear`` and ``mlp`` see the flat latent; ``pointwise`` mixes the channels at each position
    and ``separable`` looks at neighbours as well, then both take the mean over positions;
    ``transformer`` attends over the tokens of a text.
    """

    kind: TailKind
    hidden: Annotated[tuple[Count, ...], Meta(description="Sizes of the hidden layers")] = ()

    def __post_init__(self) -> None:
        if (self.kind == "linear") != (not self.hidden):
            raise ValueError(
                f"hidden: a {self.kind} tail "
                + ("has no hidden layers" if self.kind == "linear" else "needs hidden layers")
                + f", got {list(self.hidden)}"
            )
        if self.kind == "transformer" and (len(self.hidden) != 2 or self.hidden[0] % 4):
            raise ValueError(
                "hidden: a transformer tail needs its width, a multiple of 4, and the width of its "
                f"inner layer, got {list(self.hidden)}"
            )


class Student(Section, frozen=True, kw_only=True):
    """The compact network that is shipped: backbone, then tail."""

    backbone: Backbone
    tail: Tail
    fit: Fitting


class Distil(Section, frozen=True, kw_only=True):
    """Knowledge distillation (Hinton, Vinyals and Dean, 2015)."""

    temperature: Annotated[float, Meta(gt=0.0, description="Softens both distributions")]
    weight: Annotated[
        float, Meta(ge=0.0, le=1.0, description="Share of the soft loss; the rest is labels")
    ]


class Learner(Section, frozen=True, kw_only=True):
    """Defaults of the learning on devices; they travel in the bundle."""

    lr: Positive
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: NonNegative = 0.0
    momentum: Annotated[Share, Meta(description="Of sgd; adamw ignores it")] = 0.0
    clip_norm: Annotated[Positive, Meta(description="Largest norm of one step's gradient")] = 1.0
    batch_new: Annotated[Count, Meta(description="New latents in a step")] = 8
    batch_replay: Annotated[Count, Meta(description="Replayed latents in a step")] = 32
    steps_per_batch: Annotated[Count, Meta(description="Steps for each incoming batch")] = 4
    buffer_entries: Annotated[Count, Meta(description="Replayed latents kept at most")] = 200
    buffer_bytes: Annotated[Count, Meta(description="Memory of the replay buffer at most")] = (
        1 << 20
    )
    latent_dtype: Literal["int8"] = "int8"
    target: Literal["mse", "kl"] = "mse"
    temperature: Annotated[Positive, Meta(description="Of kl: softens both distributions")] = 2.0
    anchor: Annotated[bool, Meta(description="Room in the loss for EWC and L2-SP")] = False
    projection: Annotated[bool, Meta(description="A second step graph, for A-GEM")] = False


class Drift(Section, frozen=True, kw_only=True):
    """Novelty and drift on unlabelled traffic."""

    average_run_length: Annotated[
        float, Meta(gt=1.0, description="Samples between false alarms, at least, on average")
    ] = 1e5
    tolerance: Annotated[
        float,
        Meta(ge=0.0, lt=0.5, description="Shift of the mean novelty rank that is no drift"),
    ] = 0.05
    components: Annotated[
        Count, Meta(description="Whitened principal components behind the novelty score")
    ] = 32


class Quantize(Section, frozen=True, kw_only=True):
    """Precision of the shipped backbone; int8 gives way to float32 where it loses too much."""

    backbone: Literal["float32", "int8"] = "float32"
    max_accuracy_loss: Annotated[
        Share,
        Meta(description="Loss on the base classes of the holdout beyond which float32 is shipped"),
    ] = 0.01
    calibration_samples: Annotated[
        int, Meta(ge=16, description="Training samples that set the ranges of the activations")
    ] = 200


class Gate(Section, frozen=True, kw_only=True):
    """What merged weights must meet on the holdout before they are signed."""

    max_forgetting: Annotated[
        float, Meta(ge=0.0, le=1.0, description="Loss of accuracy on the base classes")
    ] = 0.05


class Recipe(Section, frozen=True, kw_only=True):
    """One run from data to student, with the defaults that travel to the devices."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    dataset: DatasetName
    seed: Annotated[int, Meta(ge=0, lt=2**31, description="Of split, weights and augmentation")]
    threads: Annotated[
        int, Meta(ge=1, description="Of torch; small networks gain nothing from a second one")
    ] = 1
    classes: Classes
    split: SplitShares
    teacher: Teacher
    student: Student
    distil: Distil
    learner: Learner
    augment: Augment = Augment()
    drift: Drift = Drift()
    gate: Gate = Gate()
    quantize: Quantize = Quantize()
    file: DataFile | None = None

    def __post_init__(self) -> None:
        if (self.dataset == "file") != (self.file is not None):
            raise ValueError(
                'file: the data set "file" needs the table [file], and no other has it; '
                f"got dataset {self.dataset!r}"
            )
        backbone = self.student.backbone
        kind = self.file.kind if self.file else INPUT_KINDS[self.dataset]
        if backbone.kind not in BACKBONES[kind]:
            fitting = " or ".join(repr(name) for name in BACKBONES[kind])
            raise ValueError(
                f"student.backbone.kind: data set {self.dataset!r} holds {kind} samples and needs "
                f"{fitting}, got {backbone.kind!r}"
            )
        tail = self.student.tail.kind
        if backbone.latent_axes not in TAIL_AXES[tail]:
            raise ValueError(
                f"student.tail.kind: a {tail} tail needs a latent with axes "
                f"{' or '.join(TAIL_AXES[tail])}, this backbone's has {backbone.latent_axes}; take "
                "linear or mlp, or another backbone, without pool"
            )
