"""A recipe: everything that decides one training run, read from one TOML file.

The same recipe and seed give the same student. Every number that matters is here with its
unit in its name, so a newcomer can read a run from top to bottom::

    from edge_ll.config import load
    recipe = load(Path("export/recipes/digits.toml"), Recipe)
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from edge_ll.config import Section

Count = Annotated[int, Meta(ge=1)]
ClassId = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0.0, lt=1.0)]
Positive = Annotated[float, Meta(gt=0.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
# Plain literals, not Annotated: so a misspelt choice is answered with the nearest one.
DatasetName = Literal["digits", "fsdd"]
BackboneKind = Literal["conv", "dscnn"]
TailKind = Literal["linear", "mlp", "pointwise", "separable", "transformer"]


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


class ImageAugment(Section, frozen=True, kw_only=True):
    """Random small changes to images; every value is the largest change, 0 switches it off."""

    max_rotation_deg: Annotated[float, Meta(ge=0.0, le=45.0)] = 0.0
    max_shift_px: NonNegative = 0.0
    max_scale: Annotated[Share, Meta(description="0.1 zooms between 0.9 and 1.1")] = 0.0
    max_noise: Annotated[
        Share, Meta(description="Largest noise deviation, as a share of full scale")
    ] = 0.0


class AudioAugment(Section, frozen=True, kw_only=True):
    """Random small changes to waveforms; every value is the largest change, 0 switches it off."""

    max_shift_s: NonNegative = 0.0
    max_gain_db: NonNegative = 0.0
    max_noise: Annotated[
        Share, Meta(description="Largest noise deviation, as a share of the clip's RMS")
    ] = 0.0


class Augment(Section, frozen=True, kw_only=True):
    """Augmentation of the pre-training; the table that fits the data set is used."""

    image: ImageAugment = ImageAugment()
    audio: AudioAugment = AudioAugment()


class Fitting(Section, frozen=True, kw_only=True):
    """One training run: AdamW, one warm-up, cosine decay to zero."""

    epochs: Annotated[int, Meta(ge=1, description="Passes over the training split")]
    batch: Annotated[int, Meta(ge=2, description="Samples per optimizer step")]
    lr: Annotated[float, Meta(gt=0.0, description="Peak learning rate")]
    weight_decay: Annotated[float, Meta(ge=0.0, description="Decoupled weight decay")] = 0.0


class Teacher(Section, frozen=True, kw_only=True):
    """The large network: accurate, never shipped."""

    width: Annotated[int, Meta(ge=4, description="Channels of its first block; doubled after")]
    fit: Fitting


class Backbone(Section, frozen=True, kw_only=True):
    """The frozen part of the student: raw input to latent.

    ``conv`` takes small images; ``dscnn`` is log-mel and separable convolutions over time.
    """

    kind: BackboneKind
    channels: Annotated[
        tuple[Count, ...], Meta(min_length=1, description="Channels of each hidden block")
    ]
    latent_channels: Annotated[Count, Meta(description="Channels of the latent")]


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

    def __post_init__(self) -> None:
        fitting = {"digits": "conv", "fsdd": "dscnn"}[self.dataset]
        if self.student.backbone.kind != fitting:
            raise ValueError(
                f"student.backbone.kind: data set {self.dataset!r} needs {fitting!r}, "
                f"got {self.student.backbone.kind!r}"
            )
        if self.student.tail.kind == "pointwise" and fitting != "dscnn":
            raise ValueError(
                "student.tail.kind: a pointwise tail needs a latent with positions, which only "
                "a dscnn backbone gives; take linear or mlp"
            )
