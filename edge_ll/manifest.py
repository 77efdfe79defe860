"""What a bundle says about itself: the contract between the server and the device.

The types here change only together with :data:`FORMAT` and a round-trip test. Fields that this
version does not know survive being read and written again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from edge_ll.errors import BundleError

FORMAT = 2
"""Version of the format; a device refuses a higher one.

2: the step graph's ``hyper`` holds bias correction and decay already, and the loss has terms. Later
additions have a default: ``backbone_precision``, ``tokenizer``.
"""

OLDEST_FORMAT = 2
"""The oldest format that this version reads: a step graph of format 1 would be misled."""

EngineName = Literal["step-graph", "ort-training"]
BackbonePrecision = Literal["float32", "int8"]
OptimizerName = Literal["adamw", "sgd"]

Count = Annotated[int, Meta(ge=1)]
Index = Annotated[int, Meta(ge=0)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")]
Shape = tuple[Count, ...]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One sample of a tensor: its shape leaves the batch axis out."""

    shape: Shape
    dtype: Literal["float32", "uint8", "int16", "int64"]

    @property
    def size(self) -> int:
        """Number of elements of one sample."""
        return math.prod(self.shape)


class TokenizerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How text becomes the backbone's input: ``max_length`` token ids int64, filled up with 0.

    Attributes:
        file: A ``tokenizer.json``.
        max_length: Length of the input.
    """

    file: str
    max_length: Count


class ThetaEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Where one parameter of the tail lies in the flat float32 vector θ."""

    name: str
    offset: Index
    shape: tuple[Count, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class ArraySpec(msgspec.Struct, frozen=True, kw_only=True):
    """A raw little-endian array in a file of the bundle."""

    file: str
    dtype: Literal["float32", "int8", "uint8", "int16", "int64"]
    shape: tuple[Index, ...]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Size and hash of one file of the bundle."""

    sha256: Digest
    size_bytes: Index


class LossTerms(msgspec.Struct, frozen=True, kw_only=True):
    """Which terms the training loss has beside cross-entropy; fixed when the graphs are made.

    Attributes:
        target: Distance to the target logits: ``mse`` (DER, DER++) or ``kl`` (LwF).
        temperature: Of ``kl``: softens both distributions.
        anchor: Whether θ is held near a centre (EWC, L2-SP).
        projection: Whether a gradient can be projected against a reference batch's (A-GEM).
    """

    target: Literal["mse", "kl"] = "mse"
    temperature: Annotated[float, Meta(gt=0)] = 2.0
    anchor: bool = False
    projection: bool = False


class LearnerDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """How the device learns unless its own configuration says otherwise."""

    optimizer: OptimizerName
    learning_rate: Annotated[float, Meta(gt=0)]
    weight_decay: Annotated[float, Meta(ge=0)]
    clip_norm: Annotated[float, Meta(gt=0)]
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    batch_new: Count
    batch_replay: Index
    steps_per_batch: Count
    buffer_entries: Index
    loss: LossTerms = LossTerms()


class DriftDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """The drift detector's promise."""

    average_run_length: Annotated[float, Meta(gt=1)]
    tolerance: Annotated[float, Meta(ge=0, lt=0.5)] = 0.0


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where a bundle comes from."""

    recipe: str
    created_at_s: float
    versions: dict[str, str] = {}
    metrics: dict[str, float] = {}
    parent: Digest | None = None
    merged_from: tuple[str, ...] = ()


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a device must know before it runs a bundle.

    Attributes:
        labels: A name per class; their number is the capacity of the tail.
        base_classes: What the novelty reference covers: classes of the pre-training data.
        known_classes: What the tail can predict as it is shipped; devices add to them.
        theta: Layout of θ, without gaps.
        backbone_precision: Of the arithmetic within the backbone; input and latents are the same.
        anchor_groups: Name -> classes, in the order in which they are taught: the columns of the
            accuracy matrix.
        arrays: ``anchor_latents`` int8, ``anchor_labels``, ``latent_scale``, ``latent_zero`` and
            the fields of the novelty reference as ``novelty_*``.
        tokenizer: Of a backbone that takes text.
        unknown: Fields of a later version, kept for writing.
    """

    format: int = FORMAT
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}\Z")]
    version: Count
    input: TensorSpec
    latent: TensorSpec
    labels: tuple[str, ...]
    base_classes: tuple[Index, ...]
    known_classes: tuple[Index, ...]
    theta: tuple[ThetaEntry, ...]
    engines: tuple[EngineName, ...]
    learner: LearnerDefaults
    drift: DriftDefaults
    anchor_groups: dict[str, tuple[Index, ...]]
    arrays: dict[str, ArraySpec]
    files: dict[str, FileEntry]
    provenance: Provenance
    backbone_precision: BackbonePrecision = "float32"
    tokenizer: TokenizerSpec | None = None
    unknown: dict[str, Any] = {}

    def __post_init__(self) -> None:
        offset = 0
        for entry in self.theta:
            if entry.offset != offset:
                raise ValueError(f"theta: {entry.name} at {entry.offset}, expected {offset}")
            offset += entry.size
        classes = {*self.base_classes, *self.known_classes}.union(*self.anchor_groups.values())
        if classes and max(classes) >= self.capacity:
            raise ValueError(f"class {max(classes)} is past the capacity {self.capacity}")
        if self.tokenizer is not None:
            given = TensorSpec(shape=(self.tokenizer.max_length,), dtype="int64")
            if self.input != given:
                raise ValueError(
                    f"tokenizer: gives {given.dtype} {list(given.shape)}, but the input is "
                    f"{self.input.dtype} {list(self.input.shape)}"
                )

    @property
    def capacity(self) -> int:
        """How many classes the tail can tell apart at most."""
        return len(self.labels)

    @property
    def theta_size(self) -> int:
        """Length of θ."""
        return sum(entry.size for entry in self.theta)

    def encode(self) -> bytes:
        """UTF-8 JSON, unknown fields included."""
        plain = msgspec.to_builtins(self)
        extra = plain.pop("unknown")
        try:
            return json.dumps(
                _overlay(extra, plain, type(self)), indent=1, allow_nan=False
            ).encode()
        except ValueError as error:
            raise BundleError(f"the manifest of {self.name} cannot be written: {error}") from error

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Read a manifest whose signature was checked.

        Raises:
            BundleError: Not JSON, an unknown format version, or a field that breaks its rule.
        """
        try:
            raw = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BundleError(f"manifest.json is not JSON: {error}") from error
        version = raw.get("format") if isinstance(raw, dict) else None
        if not isinstance(version, int) or not OLDEST_FORMAT <= version <= FORMAT:
            raise BundleError(
                f"manifest.json has format {version!r}; this version of edge-ll reads "
                f"{OLDEST_FORMAT} to {FORMAT}: update the agent, or export the bundle with an "
                "edge-ll of the agent's version"
            )
        raw.pop("unknown", None)
        try:
            manifest = msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise BundleError(f"manifest.json: {error}") from error
        absent = sorted({spec.file for spec in manifest.arrays.values()} - set(manifest.files))
        if absent:
            raise BundleError(f"arrays name files that are not listed: {', '.join(absent)}")
        if manifest.tokenizer and manifest.tokenizer.file not in manifest.files:
            raise BundleError(f"tokenizer: {manifest.tokenizer.file} is not listed")
        return msgspec.structs.replace(manifest, unknown=_unknown(raw, cls))


def _unknown(raw: Any, hint: Any) -> dict[Any, Any]:
    """What ``raw`` holds beyond the structs that ``hint`` names, at any depth."""
    hint = _required(hint)
    if raw is None:
        return {}
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        hints = get_type_hints(hint)
        extra = {key: value for key, value in raw.items() if key not in hints}
        parts = {key: (raw[key], hints[key]) for key in raw if key in hints}
    elif get_origin(hint) is dict:
        extra, parts = {}, {key: (value, get_args(hint)[1]) for key, value in raw.items()}
    elif get_origin(hint) is tuple:
        extra, parts = {}, {i: (value, get_args(hint)[0]) for i, value in enumerate(raw)}
    else:
        return {}
    return extra | {key: inner for key, part in parts.items() if (inner := _unknown(*part))}


def _overlay(extra: Mapping[Any, Any], known: Any, hint: Any) -> Any:
    """``known`` with ``extra`` put back; what belonged to an entry that is gone, goes."""
    hint = _required(hint)
    if known is None:
        return None
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        hints = get_type_hints(hint)
        merged = dict(known)
        for key, value in extra.items():
            merged[key] = _overlay(value, known[key], hints[key]) if key in hints else value
        return merged
    inner = get_args(hint)[1 if get_origin(hint) is dict else 0]
    if get_origin(hint) is dict:
        return {k: _overlay(extra[k], v, inner) if k in extra else v for k, v in known.items()}
    return [_overlay(extra[i], v, inner) if i in extra else v for i, v in enumerate(known)]


def _required(hint: Any) -> Any:
    """``X`` for the hint ``X | None``."""
    inner = [item for item in get_args(hint) if item is not NoneType]
    return inner[0] if len(inner) == 1 and NoneType in get_args(hint) else hint
