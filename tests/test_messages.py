from __future__ import annotations

import struct
from typing import get_type_hints

import cbor2
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_ll import messages as m
from edge_ll.errors import ProtocolError
from edge_ll.metrics import Counts

SESSION, DIGEST = "0123456789abcdef", "0123456789abcdef" * 4
BUNDLE = m.BundleRef(name="kws", version=3, digest=DIGEST)
REPORT = m.Report(
    session=SESSION, seq=7, at_s=1.5, bundle=BUNDLE, phase="progress", experience=1, seen=10,
    learned=9, steps=4, refused=1, prequential=Counts(3, 9), anchors={"base": Counts(1, 2)},
    evidence={"novelty": m.Evidence(now=-0.5, peak=2.0, threshold=4.6, n=9)}, loss=0.25,
    rss_bytes=55_000_000,
)  # fmt: skip
EXAMPLES = (
    m.Status(online=True, session=SESSION),
    m.Birth(
        session=SESSION, agent_version="0.1.0", engine="step-graph", provider="cpu",
        runtime="onnxruntime 1.20", python="3.11", machine="aarch64", rss_bytes=1, bundle=BUNDLE,
        placements=(
            m.Placement(graph="backbone", provider="cpu"),
            m.Placement(graph="step", provider="cuda", nodes=94, placed=90),
        ),
    ),
    m.Birth(
        session=SESSION, agent_version="0.1.0", engine="none", provider="none", runtime="none",
        python="3.11", machine="aarch64", rss_bytes=0,
    ),
    REPORT,
    msgspec.structs.replace(REPORT, loss=None, anchors={}, evidence={}),
    m.Event(session=SESSION, at_s=2.5, kind="drift", detail="novelty é"),
    m.Offer(bundle=BUNDLE, size_bytes=123),
    m.Reported(session=SESSION, bundle=BUNDLE, state="refused", detail="wrong key"),
    m.ChunkRequest(digest=DIGEST, indices=tuple(range(64))),
    m.Chunk(digest=DIGEST, index=0, data=bytes(range(256)) * 256),
    m.Chunk(digest=DIGEST, index=9, data=b""),
    m.Command(id=SESSION, verb="upload"),
    m.CommandResult(id=SESSION, ok=False, detail="busy"),
    m.UpdateOffer(
        command=SESSION, base=DIGEST, digest=DIGEST, size_bytes=4, samples=5, classes=(0, 3)
    ),
    m.UpdateRequest(digest=DIGEST, indices=(2,)),
    m.UpdateChunk(digest=DIGEST, index=1, data=b"\0\xff"),
)  # fmt: skip
ALL = m.FROM_DEVICE + m.TO_DEVICE
by_type = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
by_example = pytest.mark.parametrize("message", EXAMPLES, ids=lambda item: type(item).__name__)


def pack(message: m.Message, **changes) -> bytes:
    """The message on the wire with some raw values replaced."""
    raw = msgspec.to_builtins(message, builtin_types=(bytes,)) | changes
    return msgspec.json.encode(raw) if message.encoding == "json" else cbor2.dumps(raw)


def example_of(kind: type[m.Message]) -> m.Message:
    return next(item for item in EXAMPLES if type(item) is kind)


def cbor_with(value: bytes) -> bytes:
    """A good chunk request with one unknown field of raw CBOR."""
    good = m.ChunkRequest(digest=DIGEST, indices=(1,)).encode()
    assert good[0] == 0xA2
    return b"\xa3" + good[1:] + b"\x61z" + value


def test_there_is_an_example_of_every_message():
    assert {type(item) for item in EXAMPLES} == set(ALL)
    assert len(ALL) == len(set(ALL))


@by_example
def test_every_message_survives_the_wire(message):
    payload = message.encode()
    back = type(message).decode(payload)
    assert back == message
    assert type(back) is type(message)
    assert back.encode() == payload
    assert len(payload) <= m.MAX_MESSAGE_BYTES


@by_example
def test_unknown_fields_are_ignored(message):
    later = {"later": 1, "more": {"deep": [None, "x"]}}
    assert type(message).decode(pack(message, **later)) == message


@by_type
def test_every_required_field_is_required(kind):
    message = example_of(kind)
    for field in msgspec.structs.fields(kind):
        raw = msgspec.to_builtins(message, builtin_types=(bytes,))
        del raw[field.name]
        payload = msgspec.json.encode(raw) if kind.encoding == "json" else cbor2.dumps(raw)
        if field.required:
            with pytest.raises(ProtocolError, match=rf"{kind.__name__}: .*{field.name}"):
                kind.decode(payload)
        else:
            assert getattr(kind.decode(payload), field.name) == field.default


@by_type
def test_a_wrong_type_in_any_field_is_refused(kind):
    message = example_of(kind)
    for field in msgspec.structs.fields(kind):
        with pytest.raises(ProtocolError, match=kind.__name__):
            kind.decode(pack(message, **{field.name: {"not": ["this"]}}))


@by_type
def test_what_is_too_large_is_refused_unread(kind, monkeypatch):
    def read(*_):
        raise AssertionError("read although too large")

    monkeypatch.setattr(msgspec.json, "decode", read)
    monkeypatch.setattr(cbor2, "loads", read)
    with pytest.raises(ProtocolError, match="at most 262144 bytes, got 262145"):
        kind.decode(bytes(m.MAX_MESSAGE_BYTES + 1))


@by_type
@given(data=st.binary(max_size=200))
@settings(max_examples=40, deadline=None)
def test_garbage_is_refused(kind, data):
    with pytest.raises(ProtocolError, match=kind.__name__):
        kind.decode(data)


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_payload_is_refused_or_read_as_its_type(message, data):
    payload = bytearray(message.encode()[:2000])
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        back = type(message).decode(bytes(payload))
    except ProtocolError:
        return
    assert type(back).decode(back.encode()) == back


@by_example
def test_a_cut_payload_is_refused(message):
    payload = message.encode()
    for size in {0, 1, len(payload) // 2, len(payload) - 1}:
        with pytest.raises(ProtocolError):
            type(message).decode(payload[:size])


def test_something_behind_a_message_is_refused():
    with pytest.raises(ProtocolError, match="trailing"):
        m.Command.decode(m.Command(id=SESSION, verb="upload").encode() + b"1")


U64 = b"\xff" * 8
BOMBS = {
    "deep arrays": b"\x81" * 200_000,
    "deep maps": b"\xa1\x61a" * 60_000,
    "deep keys": b"\xa1\x81" * 100_000,
    "deep tags": b"\xc1" * 200_000,
    "deep unknown tags": b"\xd9\x30\x39" * 80_000,
    "deep indefinite arrays": b"\x9f" * 200_000,
    "deep sets": b"\xd9\x01\x02\x81" * 60_000,
    "deep json": b"[" * 200_000,
    "deep json objects": b'{"a":' * 50_000,
    "array of 2^64": b"\x9b" + U64,
    "array of 2^31": b"\x9a\x7f\xff\xff\xff",
    "arrays of 2^28 in each other": b"\x9a\x0f\xff\xff\xff" * 300,
    "map of 2^64": b"\xbb" + U64,
    "map of 2^31": b"\xba\x7f\xff\xff\xff",
    "bytes of 2^64": b"\x5b" + U64,
    "bytes of 2^31": b"\x5a\x7f\xff\xff\xff",
    "text of 2^64": b"\x7b" + U64,
    "text of 2^31": b"\x7a\x7f\xff\xff\xff",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.timeout(20)
def test_bombs_are_refused(bomb):
    for kind, payload in [
        (m.Report, bomb),
        (m.Event, bomb),
        (m.ChunkRequest, cbor_with(bomb)),
        (m.Command, b'{"id":"0123456789abcdef","verb":"upload","z":' + bomb),
    ]:
        with pytest.raises(ProtocolError):
            kind.decode(payload)


MALFORMED = {
    "date of text": b"\xc0\x61x",
    "huge epoch": b"\xc1\x1b" + U64,
    "epoch that is not a number": b"\xc1\xf9\x7e\x00",
    "bignum of text": b"\xc2\x61a",
    "huge decimal exponent": b"\xc4\x82\x1b" + U64 + b"\x01",
    "huge bigfloat exponent": b"\xc5\x82\x1a\x3f\xff\xff\xff\x01",
    "rational over zero": b"\xd8\x1e\x82\x01\x00",
    "broken regular expression": b"\xd8\x23\x61(",
    "broken UUID": b"\xd8\x25\x41x",
    "broken address": b"\xd9\x01\x04\x41x",
    "broken network": b"\xd9\x01\x05\xa1\x41x\x01",
    "set of a number": b"\xd9\x01\x02\x01",
    "reference to nothing": b"\xd8\x1d\x05",
    "reference to itself": b"\xd8\x1c\xd8\x1d\x00",
    "set that holds itself": b"\xd8\x1c\xd9\x01\x02\x81\xd8\x1d\x00",
    "map that is its own key": b"\xd8\x1c\xa1\xd8\x1d\x00\x01",
    "string reference to nothing": b"\xd9\x01\x00\xd8\x19\x05",
    "string reference outside": b"\xd8\x19\x00",
    "broken text": b"\x61\xff",
    "break alone": b"\xff",
    "reserved length": b"\x1c",
    "mixed chunks": b"\x5f\x61a\xff",
    "complex of text": b"\xd9\xa7\xf8\x82\x61a\x01",
}


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED)
def test_malformed_items_are_refused_wherever_they_stand(value):
    for payload in (value, cbor_with(value)):
        with pytest.raises(ProtocolError):
            m.ChunkRequest.decode(payload)


CYCLES = {"array": b"\xd8\x1c\x81\xd8\x1d\x00", "map": b"\xd8\x1c\xa1\x61a\xd8\x1d\x00"}


@pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES)
def test_a_structure_that_holds_itself_ends(cycle):
    with pytest.raises(ProtocolError):
        m.ChunkRequest.decode(cycle)
    good = m.ChunkRequest(digest=DIGEST, indices=(1,))
    try:
        assert m.ChunkRequest.decode(cbor_with(cycle)) == good
    except ProtocolError as error:
        assert "ChunkRequest" in str(error)  # noqa: PT017 -- refusing it is as good


# Tags make a decoder build things: a regular expression of 7 kB takes seconds to compile, a
# decimal of 240 kB seconds to convert. No message of this protocol has any.
TAGGED = {
    "regular expression": cbor2.CBORTag(35, "a"),
    "mail": cbor2.CBORTag(36, f"digest: {DIGEST}\n"),
    "decimal": cbor2.CBORTag(4, [1, 5]),
    "bigfloat": cbor2.CBORTag(5, [1, 5]),
    "rational": cbor2.CBORTag(30, [1, 2]),
}


@pytest.mark.parametrize("value", TAGGED.values(), ids=TAGGED)
def test_tags_that_make_a_decoder_work_are_refused(value):
    with pytest.raises(ProtocolError):
        m.ChunkRequest.decode(cbor_with(cbor2.dumps(value)))


FLOATS = [("Report", "at_s"), ("Report", "loss"), ("Event", "at_s")]


@pytest.mark.parametrize(("name", "field"), FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e301])
def test_numbers_that_are_none_are_refused(name, field, value):
    message = example_of(getattr(m, name))
    with pytest.raises(ProtocolError, match=field):
        type(message).decode(pack(message, **{field: value}))


@pytest.mark.parametrize("field", ["now", "peak", "threshold"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_evidence_is_finite(field, value):
    state = {"now": 0.0, "peak": 1.0, "threshold": 2.0, "n": 1} | {field: value}
    with pytest.raises(ProtocolError, match=field):
        m.Report.decode(pack(REPORT, evidence={"novelty": state}))


BROKEN = [
    (m.Status, {"session": "0123456789abcde"}),
    (m.Status, {"session": SESSION + "\n"}),
    (m.Status, {"session": SESSION.upper()}),
    (m.Status, {"online": 1}),
    (m.Birth, {"engine": "x" * 129}),
    (m.Birth, {"rss_bytes": -1}),
    (m.Birth, {"rss_bytes": 2**53}),
    (m.Birth, {"bundle": {"name": "kws", "version": 0, "digest": DIGEST}}),
    (m.Report, {"seq": -1}),
    (m.Report, {"seq": 2**64 - 1}),
    (m.Report, {"seq": True}),
    (m.Report, {"seq": 1.0}),
    (m.Report, {"phase": "unheard-of"}),
    (m.Report, {"prequential": [2, 1]}),
    (m.Report, {"prequential": [-1, 1]}),
    (m.Report, {"prequential": [1]}),
    (m.Report, {"anchors": {"base": [1, 2**53]}}),
    (m.Report, {"anchors": {"x" * 129: [0, 1]}}),
    (m.Report, {"anchors": {1: [0, 1]}}),
    (m.Report, {"evidence": {"d": {"now": 0.0, "peak": 0.0, "threshold": 0.0, "n": 0}}}),
    (m.Event, {"kind": "unheard-of"}),
    (m.Event, {"detail": "x" * 2001}),
    (m.Offer, {"size_bytes": 0}),
    (m.Offer, {"bundle": {"name": "k", "version": 1, "digest": DIGEST + "\n"}}),
    (m.Offer, {"bundle": {"name": "k", "version": 1, "digest": "../" + DIGEST[3:]}}),
    (m.ChunkRequest, {"indices": []}),
    (m.ChunkRequest, {"indices": list(range(65))}),
    (m.ChunkRequest, {"indices": [-1]}),
    (m.ChunkRequest, {"digest": DIGEST + "\n"}),
    (m.Chunk, {"data": bytes(m.CHUNK_BYTES + 1)}),
    (m.Chunk, {"index": -1}),
    (m.Chunk, {"index": 2**63}),
    (m.UpdateOffer, {"size_bytes": 0}),
    (m.UpdateOffer, {"classes": [-1]}),
    (m.Command, {"verb": "reboot"}),
]


@pytest.mark.parametrize(("kind", "changes"), BROKEN)
def test_broken_rules_are_refused(kind, changes):
    with pytest.raises(ProtocolError, match=next(iter(changes))):
        kind.decode(pack(example_of(kind), **changes))


reals = st.floats(-1e300, 1e300)
indices = st.integers(0, 2**53 - 1)
names = st.text(max_size=128)
counted = indices.flatmap(lambda n: st.builds(Counts, st.integers(0, n), st.just(n)))
states = st.builds(m.Evidence, now=reals, peak=reals, threshold=st.floats(1e-300, 1e300), n=indices)


@given(
    st.builds(
        msgspec.structs.replace,
        st.just(REPORT),
        seq=indices,
        at_s=reals,
        prequential=counted,
        anchors=st.dictionaries(names, counted, max_size=4),
        evidence=st.dictionaries(names, states, max_size=3),
        loss=st.none() | reals,
        phase=st.sampled_from(["baseline", "progress", "experience", "activated"]),
    )
)
@settings(deadline=None)
def test_any_report_survives_the_wire(report):
    assert m.Report.decode(report.encode()) == report


@given(st.binary(max_size=500) | st.just(bytes(m.CHUNK_BYTES)), indices)
@settings(deadline=None)
def test_any_chunk_survives_the_wire(data, index):
    chunk = m.Chunk(digest=DIGEST, index=index, data=data)
    assert m.Chunk.decode(chunk.encode()) == chunk


def test_the_largest_chunk_leaves_room():
    chunk = m.Chunk(digest=DIGEST, index=2**53 - 1, data=bytes(m.CHUNK_BYTES))
    assert len(chunk.encode()) < m.CHUNK_BYTES + 256


@given(st.text(max_size=2000))
@example("x" * 2000)
def test_any_detail_survives_the_wire(detail):
    event = m.Event(session=SESSION, at_s=0.0, kind="drift", detail=detail)
    assert m.Event.decode(event.encode()) == event


GOOD_LEVELS = ["a", "hub-1", "A_b-9", "x" * 64]
BAD_LEVELS = [
    "",
    "x" * 65,
    "a b",
    "a/b",
    "+",
    "#",
    "a+",
    "é",
    "a.b",
    "a\n",
    "\n",
    "$SYS",
    "a\0",
    "٣",
]


@pytest.mark.parametrize("level", GOOD_LEVELS)
def test_good_addresses(level):
    assert m.Address(level, level).device == level


@pytest.mark.parametrize("level", BAD_LEVELS)
def test_bad_addresses_are_refused(level):
    for tenant, device in ((level, "d"), ("t", level)):
        with pytest.raises(ProtocolError, match="cannot be a tenant or device"):
            m.Address(tenant, device)
    with pytest.raises(ProtocolError):
        m.Status.topic_filter(level)


@by_type
@pytest.mark.parametrize("level", GOOD_LEVELS)
def test_a_topic_names_its_device_and_fits_any_broker(kind, level):
    address = m.Address("t" * 64, level)
    topic = kind.topic(address)
    assert m.Address.of(topic) == address
    assert topic.count("/") <= 7
    assert len(topic.encode()) <= 256
    assert kind.topic_filter("t" * 64) == topic.replace(f"/{level}/", "/+/")


def test_no_two_messages_share_a_topic():
    address = m.Address("t", "d")
    topics = {kind.topic(address) for kind in ALL}
    assert len(topics) == len(ALL)
    assert all(topic.startswith("el/v1/t/d/d/") for topic in topics)


@pytest.mark.parametrize(
    "topic",
    [
        "", "/", "el/v1", "el/v1/t/d/dev", "el/v2/t/d/dev/status", "xx/v1/t/d/dev/status",
        "el/v1/t/x/dev/status", "el/v1/t/meta/dev/x", "/el/v1/t/d/dev/status",
        "el/v1//d/dev/status", "el/v1/t/d//status", "el/v1/+/d/+/status", "el/v1/t/d/dev\n/status",
        "el/v1/t/d/#/x", "EL/v1/t/d/dev/status",
    ],
)  # fmt: skip
def test_other_topics_have_no_address(topic):
    with pytest.raises(ProtocolError):
        m.Address.of(topic)


@given(st.text(max_size=40))
def test_any_topic_has_an_address_or_is_refused(topic):
    try:
        address = m.Address.of(topic)
    except ProtocolError:
        return
    assert topic.startswith(f"el/v1/{address.tenant}/d/{address.device}/")


def test_addresses_sort_by_tenant_then_device():
    a, b, c = m.Address("a", "z"), m.Address("b", "a"), m.Address("b", "b")
    assert sorted([c, a, b]) == [a, b, c]


@by_type
def test_a_message_is_frozen(kind):
    message = example_of(kind)
    with pytest.raises(AttributeError):
        setattr(message, next(iter(get_type_hints(kind).keys() - {"suffix", "encoding"})), None)


def test_only_the_last_known_state_is_retained():
    assert {kind for kind in ALL if kind.retain} == {m.Status, m.Offer, m.Reported}


def test_half_precision_floats_are_read():
    """What other encoders send for a short float."""
    raw = REPORT.encode().replace(b"\xfb" + struct.pack(">d", 1.5), b"\xf9\x3e\x00")
    assert len(raw) == len(REPORT.encode()) - 6
    assert m.Report.decode(raw) == REPORT
