"""Every message between a device and the fleet: one frozen type each, with its topic and encoding.

``docs/protocol.md`` is the reference for people; a test holds it against this file. JSON carries
what people read, CBOR (RFC 8949) what is frequent or large. A receiver ignores fields that it does
not know and refuses what breaks a field's rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

import cbor2
import msgspec
from msgspec import Meta

from edge_ll.errors import ProtocolError
from edge_ll.manifest import Digest
from edge_ll.metrics import Counts

ROOT = "el/v1"
MAX_MESSAGE_BYTES = 256 * 1024
CHUNK_BYTES = 64 * 1024
MAX_BUNDLE_BYTES = 2**31

Count = Annotated[int, Meta(ge=1, lt=2**53)]
Index = Annotated[int, Meta(ge=0, lt=2**53)]
Real = Annotated[float, Meta(ge=-1e300, le=1e300)]  # NaN and infinities fail both
Text = Annotated[str, Meta(max_length=2000)]
Name = Annotated[str, Meta(max_length=128)]
Session = Annotated[str, Meta(pattern="^[0-9a-f]{16}\\Z")]

_LEVEL = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Address(msgspec.Struct, frozen=True, order=True):
    """A device within a tenant: part of the topic, never of a payload, so a broker can guard it."""

    tenant: str
    device: str

    def __post_init__(self) -> None:
        check_level(self.tenant)
        check_level(self.device)

    @classmethod
    def of(cls, topic: str) -> Address:
        """The address in a device's topic.

        Raises:
            ProtocolError: The topic is not one of a device.
        """
        levels = topic.split("/")
        if len(levels) < 6 or levels[:2] != ROOT.split("/") or levels[3] != "d":
            raise ProtocolError(f"{topic!r} is not a device's topic ({ROOT}/tenant/d/device/...)")
        return cls(levels[2], levels[4])


def check_level(name: str) -> None:
    """Refuse a name that cannot be a tenant or a device: a level of a topic.

    Raises:
        ProtocolError: It is empty, too long, or holds other characters than A-Z a-z 0-9 _ -.
    """
    if not _LEVEL.fullmatch(name):
        raise ProtocolError(
            f"{name!r} cannot be a tenant or device: expected 1 to 64 of A-Z a-z 0-9 _ -"
        )


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages: how one is addressed, encoded and decoded."""

    suffix: ClassVar[str]
    encoding: ClassVar[Literal["json", "cbor"]]
    retain: ClassVar[bool] = False

    @classmethod
    def topic(cls, address: Address) -> str:
        """The topic for one device."""
        return f"{ROOT}/{address.tenant}/d/{address.device}/{cls.suffix}"

    @classmethod
    def topic_filter(cls, tenant: str) -> str:
        """The filter for all devices of a tenant."""
        check_level(tenant)
        return f"{ROOT}/{tenant}/d/+/{cls.suffix}"

    def encode(self) -> bytes:
        """The payload."""
        if self.encoding == "json":
            return msgspec.json.encode(self)
        return cbor2.dumps(msgspec.to_builtins(self, builtin_types=(bytes,)))

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """Read a payload.

        Raises:
            ProtocolError: It is too large, not of this encoding, or a field breaks its rule.
        """
        if len(payload) > MAX_MESSAGE_BYTES:
            raise ProtocolError(
                f"{cls.__name__}: expected at most {MAX_MESSAGE_BYTES} bytes, got {len(payload)}"
            )
        try:
            decode: Callable[[bytes], Any]
            decode = msgspec.json.decode if cls.encoding == "json" else _cbor
            raw = decode(payload)
            return msgspec.convert(raw, cls)
        except (msgspec.MsgspecError, cbor2.CBORError, ValueError, RecursionError) as error:
            raise ProtocolError(f"{cls.__name__}: {error}") from error


# Tags make a decoder build regular expressions, big numbers, dates...: work for an attacker.
def _refuse_tag(*_: Any) -> Any:
    raise ValueError("holds a CBOR tag; no message has any")


_TAGS = (
    0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000,
    55799,
)  # fmt: skip
_NO_TAGS = dict.fromkeys(_TAGS, _refuse_tag)


def _cbor(payload: bytes) -> Any:
    return cbor2.loads(payload, semantic_decoders=_NO_TAGS, tag_hook=_refuse_tag, max_depth=16)


class BundleRef(msgspec.Struct, frozen=True, kw_only=True):
    """Which bundle is meant."""

    name: Name
    version: Count
    digest: Digest


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """State of one drift detector since its start, in natural logarithms.

    An alarm is due when ``peak`` reaches ``threshold`` = log(average run length).
    """

    now: Real
    peak: Real
    threshold: Annotated[float, Meta(gt=0, le=1e300)]
    n: Index


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where one graph really runs: ``placed`` of its ``nodes`` on the provider, others on the CPU.

    Both are null where the runtime does not tell.
    """

    graph: Name
    provider: Name
    nodes: Index | None = None
    placed: Index | None = None


class Status(Message, frozen=True, kw_only=True):
    """Is the agent connected? Also the last will: the broker then says ``online = false``."""

    suffix: ClassVar[str] = "status"
    encoding: ClassVar[Literal["json", "cbor"]] = "json"
    retain: ClassVar[bool] = True

    online: bool
    session: Session


class Birth(Message, frozen=True, kw_only=True):
    """Who the agent is; sent at each connection and each switch of bundles.

    ``engine``, ``provider`` and ``runtime`` say what really runs: ``none`` without a bundle.
    ``provider`` names each one in use, ``placements`` says it graph by graph.
    """

    suffix: ClassVar[str] = "birth"
    encoding: ClassVar[Literal["json", "cbor"]] = "json"

    session: Session
    agent_version: Name
    engine: Name
    provider: Name
    runtime: Name
    python: Name
    machine: Name
    rss_bytes: Index
    bundle: BundleRef | None = None
    placements: tuple[Placement, ...] = ()


class Report(Message, frozen=True, kw_only=True):
    """What the agent saw and learned, in counts.

    Counts run from the agent's first start, so that a lost report costs detail, never truth;
    ``anchors`` is a measurement of the moment.
    """

    suffix: ClassVar[str] = "report"
    encoding: ClassVar[Literal["json", "cbor"]] = "cbor"

    session: Session
    seq: Index
    at_s: Real
    bundle: BundleRef
    phase: Literal["baseline", "progress", "experience", "activated"]
    experience: Index
    seen: Index
    learned: Index
    steps: Index
    refused: Index
    prequential: Counts
    anchors: dict[Name, Counts]
    evidence: dict[Name, Evidence]
    loss: Real | None = None
    rss_bytes: Index = 0


class Event(Message, frozen=True, kw_only=True):
    """Something that a person may want to know at once."""

    suffix: ClassVar[str] = "event"
    encoding: ClassVar[Literal["json", "cbor"]] = "json"

    session: Session
    at_s: Real
    kind: Literal["bundle_refused", "drift", "stream_ended"]
    detail: Text


class Offer(Message, frozen=True, kw_only=True):
    """The bundle that the fleet wants this device to run: its desired state."""

    suffix: ClassVar[str] = "desired"
    encoding: ClassVar[Literal["json", "cbor"]] = "json"
    retain: ClassVar[bool] = True

    bundle: BundleRef
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_BUNDLE_BYTES)]


class Reported(Message, frozen=True, kw_only=True):
    """What the device made of the offer: its reported state."""

    suffix: ClassVar[str] = "reported"
    encoding: ClassVar[Literal["json", "cbor"]] = "json"
    retain: ClassVar[bool] = True

    session: Session
    bundle: BundleRef
    state: Literal["pulling", "active", "refused"]
    detail: Text = ""


class ChunkRequest(Message, frozen=True, kw_only=True):
    """Device to fleet: send these chunks of a bundle."""

    suffix: ClassVar[str] = "blob/get"
    encoding: ClassVar[Literal["json", "cbor"]] = "cbor"

    digest: Digest
    indices: Annotated[tuple[Index, ...], Meta(min_length=1, max_length=64)]


class Chunk(Message, frozen=True, kw_only=True):
    """Fleet to device: one chunk of a bundle."""

    suffix: ClassVar[str] = "blob/chunk"
    encoding: ClassVar[Literal["json", "cbor"]] = "cbor"

    digest: Digest
    index: Index
    data: Annotated[bytes, Meta(max_length=CHUNK_BYTES)]


class Command(Message, frozen=True, kw_only=True):
    """Fleet to device: do something now."""

    suffix: ClassVar[str] = "cmd"
    encoding: ClassVar[Literal["json", "cbor"]] = "json"

    id: Session
    verb: Literal["upload"]


class CommandResult(Message, frozen=True, kw_only=True):
    """Device to fleet: what came of a command."""

    suffix: ClassVar[str] = "cmd/res"
    encoding: ClassVar[Literal["json", "cbor"]] = "json"

    id: Session
    ok: bool
    detail: Text = ""


class UpdateOffer(Message, frozen=True, kw_only=True):
    """Device to fleet: a tail learned on top of ``base``, θ as float32 little-endian bytes."""

    suffix: ClassVar[str] = "up/offer"
    encoding: ClassVar[Literal["json", "cbor"]] = "cbor"

    command: Session
    base: Digest
    digest: Digest
    size_bytes: Count
    samples: Index
    classes: tuple[Index, ...]


class UpdateRequest(ChunkRequest, frozen=True, kw_only=True):
    """Fleet to device: send these chunks of an update."""

    suffix: ClassVar[str] = "up/get"


class UpdateChunk(Chunk, frozen=True, kw_only=True):
    """Device to fleet: one chunk of an update."""

    suffix: ClassVar[str] = "up/chunk"


FROM_DEVICE: tuple[type[Message], ...] = (
    Status, Birth, Report, Event, Reported, ChunkRequest, CommandResult, UpdateOffer, UpdateChunk,
)  # fmt: skip
TO_DEVICE: tuple[type[Message], ...] = (Offer, Chunk, Command, UpdateRequest)
