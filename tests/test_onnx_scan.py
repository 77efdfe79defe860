from __future__ import annotations

from importlib.util import find_spec

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_ll.errors import BundleError
from edge_ll.onnx_scan import check_onnx

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
needs_onnx = pytest.mark.skipif(find_spec("onnx") is None, reason='needs the extra "export"')


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3 | VARINT) + varint(value)


def part(field: int, *chunks: bytes) -> bytes:
    data = b"".join(chunks)
    return varint(field << 3 | BYTES) + varint(len(data)) + data


def wide_key(field: int, wire: int) -> bytes:
    """A field's key with a bit past the 32nd, which parsers that keep 32 bits do not see."""
    key = field << 3 | wire | 1 << 32
    return bytes([key >> shift & 0x7F | 0x80 for shift in (0, 7, 14, 21)]) + bytes([key >> 28])


# Field numbers of onnx.proto.
def model(*parts: bytes) -> bytes:
    return number(1, 8) + part(2, b"tests") + b"".join(parts)


def graph(*parts: bytes) -> bytes:
    return part(7, part(2, b"g"), *parts)


def node(*parts: bytes) -> bytes:
    return part(1, part(1, b"x"), part(2, b"y"), part(4, b"If"), *parts)


def subgraph(*parts: bytes, field: int = 6) -> bytes:
    return part(5, part(1, b"then_branch"), part(field, *parts), number(20, 5))


def attribute(field: int, *parts: bytes) -> bytes:
    return node(part(5, part(1, b"value"), part(field, *parts)))


TENSOR = number(1, 4) + number(2, 1) + part(8, b"w")
ENTRY = part(13, part(1, b"location") + part(2, b"/etc/passwd"))
EXTERNAL = TENSOR + ENTRY + number(14, 1)
PLAIN = TENSOR + part(9, bytes(16)) + number(14, 0)

# Every place where a tensor can lie.
PLACES = {
    "initializer": lambda t: model(graph(part(5, t))),
    "second initializer": lambda t: model(graph(part(5, PLAIN), part(5, t))),
    "sparse initializer, values": lambda t: model(graph(part(15, part(1, t)))),
    "sparse initializer, indices": lambda t: model(graph(part(15, part(1, PLAIN), part(2, t)))),
    "attribute": lambda t: model(graph(attribute(5, t))),
    "attribute, list": lambda t: model(graph(attribute(10, t))),
    "attribute, sparse": lambda t: model(graph(attribute(22, part(1, t)))),
    "attribute, sparse list": lambda t: model(graph(attribute(23, part(2, t)))),
    "subgraph": lambda t: model(graph(node(subgraph(part(5, t))))),
    "subgraph, list": lambda t: model(graph(node(subgraph(part(5, t), field=11)))),
    "subgraph of a subgraph": lambda t: model(
        graph(node(subgraph(node(subgraph(attribute(5, t))))))
    ),
    "function": lambda t: model(graph(), part(25, part(1, b"f"), part(7, part(5, part(5, t))))),
    "function, default attribute": lambda t: model(graph(), part(25, part(11, part(5, t)))),
    "training, initialization": lambda t: model(graph(), part(20, part(1, part(5, t)))),
    "training, algorithm": lambda t: model(graph(), part(20, part(2, part(5, t)))),
    "a second graph field": lambda t: model(graph(part(5, PLAIN)), graph(part(5, t))),
    "a first graph field": lambda t: model(graph(part(5, t)), graph()),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_plain_tensor_passes_in_every_place(place):
    check_onnx("m.onnx", PLACES[place](PLAIN))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "tensor",
    [EXTERNAL, TENSOR + ENTRY, TENSOR + number(14, 1), number(14, 1) + TENSOR + number(14, 0)],
    ids=["both", "entry only", "location only", "location reset"],
)
def test_external_data_is_refused_in_every_place(place, tensor):
    with pytest.raises(BundleError, match=r"^m\.onnx: holds external data"):
        check_onnx("m.onnx", PLACES[place](tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        TENSOR + wide_key(13, BYTES) + ENTRY[1:] + wide_key(14, VARINT) + b"\x01",
        TENSOR + number(14, 1 << 32),
        TENSOR + varint(13 << 3 | BYTES) + b"\x80\x80\x00",
        TENSOR + b"\xea\x00" + ENTRY[1:],
    ],
    ids=["33-bit keys", "33-bit location", "padded empty entry", "padded key"],
)
def test_unusual_encodings_hide_nothing(tensor):
    with pytest.raises(BundleError):
        check_onnx("m.onnx", PLACES["initializer"](tensor))


def test_a_location_of_another_wire_type_is_no_location():
    """Parsers put it among the unknown fields; it must not stop the scan either."""
    for odd in (part(14, b"\x01"), varint(14 << 3 | FIXED32) + bytes(4)):
        check_onnx("m.onnx", PLACES["initializer"](PLAIN + odd))
        with pytest.raises(BundleError, match="external"):
            check_onnx("m.onnx", PLACES["initializer"](TENSOR + odd + ENTRY))


def in_domain(domain: bytes) -> dict[str, bytes]:
    op = node(part(7, domain))
    return {
        "graph": model(graph(op)),
        "subgraph": model(graph(node(subgraph(op)))),
        "function": model(graph(), part(25, part(7, op[2:]))),
        "last of two": model(graph(node(part(7, b""), part(7, domain)))),
        "first of two": model(graph(node(part(7, domain), part(7, b"")))),
    }


@pytest.mark.parametrize("place", in_domain(b""))
@pytest.mark.parametrize(
    "domain", [b"com.microsoft", b"evil", b"ai.onnx\0", b"\xff\xfe", b"AI.ONNX"]
)
def test_other_domains_are_refused(place, domain):
    with pytest.raises(BundleError, match=r"^m\.onnx: operator domain .* is not allowed"):
        check_onnx("m.onnx", in_domain(domain)[place])


@pytest.mark.parametrize("place", in_domain(b""))
def test_allowed_domains_pass(place):
    for domain in (b"", b"ai.onnx"):
        check_onnx("m.onnx", in_domain(domain)[place])
    check_onnx("m.onnx", in_domain(b"com.microsoft")[place], domains=("", "com.microsoft"))


def test_a_domain_behind_a_33_bit_key_is_refused():
    with pytest.raises(BundleError):
        check_onnx("m.onnx", model(graph(node(wide_key(7, BYTES) + b"\x04evil"))))


def test_the_other_format_of_the_runtime_is_refused():
    """Runtimes tell their own format by four bytes, whatever the rest looks like."""
    polyglot = part(2, b"\0\0ORTM") + graph()
    assert polyglot[4:8] == b"ORTM"
    with pytest.raises(BundleError):
        check_onnx("m.onnx", polyglot)


def test_field_number_zero_is_not_protobuf():
    with pytest.raises(BundleError):
        check_onnx("m.onnx", graph() + b"\x00\x01")


WHOLE = model(graph(part(5, PLAIN), node(subgraph(part(5, PLAIN)), part(7, b"ai.onnx"))))


def test_a_whole_model_passes():
    check_onnx("m.onnx", WHOLE)


@pytest.mark.parametrize("size", range(len(WHOLE)))
def test_a_truncated_model_is_refused_or_lacks_its_graph(size):
    with pytest.raises(BundleError, match=r"truncated|no graph"):
        check_onnx("m.onnx", WHOLE[:size])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "no graph"),
        (model(), "no graph"),
        (model(number(7, 1)), "no graph"),
        (b"\x0b\x0c", "wire type 3"),
        (graph() + b"\x0c", "wire type 4"),
        (graph() + b"\x0e", "wire type 6"),
        (b"\x08" + b"\xff" * 20, "endless varint"),
        (b"\xff" * 20, "endless varint"),
        (graph() + varint(9 << 3 | FIXED64) + bytes(7), "truncated"),
        (graph() + varint(9 << 3 | FIXED32) + bytes(3), "truncated"),
        (graph() + varint(9 << 3 | BYTES) + varint(2**60), "truncated"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "."),
    ],
)
def test_what_is_no_model_is_refused(data, expected):
    with pytest.raises(BundleError, match=rf"^m\.onnx: .*{expected}"):
        check_onnx("m.onnx", data)


@pytest.mark.parametrize("wire", [FIXED64, FIXED32])
def test_fixed_width_fields_are_stepped_over(wire):
    skipped = varint(9 << 3 | wire) + bytes(8 if wire == FIXED64 else 4)
    check_onnx("m.onnx", skipped + graph())
    with pytest.raises(BundleError, match="external"):
        check_onnx("m.onnx", skipped + graph(part(5, skipped, EXTERNAL)))


def nested(depth: int) -> bytes:
    inside = b""
    for _ in range(depth):
        inside = node(subgraph(inside))
    return model(graph(inside))


def test_nesting_is_bounded():
    check_onnx("m.onnx", nested(8))
    for depth in (12, 1000):
        with pytest.raises(BundleError, match="nested deeper"):
            check_onnx("m.onnx", nested(depth))


def verdict(data: bytes) -> str:
    """The refusal; no other exception may come."""
    try:
        check_onnx("m.onnx", data)
    except BundleError as error:
        return str(error)
    return "m.onnx: passed"


@given(st.binary(max_size=400))
@example(b"\x3a\x02\x3a\x00" * 100)
@settings(max_examples=400)
def test_random_bytes_pass_or_are_refused(data):
    for blob in (data, graph() + data, graph(data), graph(node(data)), graph(part(5, data))):
        assert verdict(blob).startswith("m.onnx: ")


@given(st.data())
@settings(max_examples=200)
def test_a_flipped_byte_passes_or_is_refused(data):
    broken = bytearray(PLACES["subgraph of a subgraph"](EXTERNAL))
    broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    assert verdict(bytes(broken)).startswith("m.onnx: ")


def onnx_model(where: str):
    import onnx
    from onnx import helper

    tensor = onnx.TensorProto(name="w", data_type=1, dims=[2], raw_data=bytes(8))
    outside = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=1)
    outside.external_data.add(key="location", value="../secret")
    value = helper.make_tensor_value_info("y", 1, [2])
    plain, initial, functions = helper.make_node("Constant", [], ["y"], value=tensor), [], []
    hidden = helper.make_node("Constant", [], ["y"], value=outside)
    branch = helper.make_graph([hidden], "b", [], [value])
    nodes = [plain]
    if where == "initializer":
        initial = [outside]
    elif where == "attribute":
        nodes = [hidden]
    elif where == "subgraph":
        nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    elif where == "function":
        opset = [helper.make_opsetid("", 18)]
        functions = [helper.make_function("ai.onnx", "F", [], ["y"], [hidden], opset)]
    body = helper.make_graph(nodes, "g", [], [value], initializer=initial)
    built = helper.make_model(body, functions=functions, ir_version=10)
    return built.SerializeToString()


@needs_onnx
@pytest.mark.torch
def test_a_model_of_the_onnx_package_passes():
    check_onnx("m.onnx", onnx_model("nowhere"))


@needs_onnx
@pytest.mark.torch
@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph", "function"])
def test_external_data_written_by_the_onnx_package_is_refused(where):
    with pytest.raises(BundleError, match="holds external data"):
        check_onnx("m.onnx", onnx_model(where))


@needs_onnx
@pytest.mark.torch
def test_the_scan_knows_every_field_that_leads_to_a_tensor_or_a_graph():
    """Held against the descriptors, so that a later ONNX that adds a field is noticed."""
    import onnx

    from edge_ll import onnx_scan

    names = {
        "ModelProto": "model", "TrainingInfoProto": "training", "GraphProto": "graph",
        "FunctionProto": "function", "NodeProto": "node", "AttributeProto": "attribute",
        "SparseTensorProto": "sparse", "TensorProto": "tensor",
    }  # fmt: skip
    for proto, message in names.items():
        fields = getattr(onnx, proto).DESCRIPTOR.fields
        expected = {
            field.number: names[field.message_type.name]
            for field in fields
            if field.message_type is not None and field.message_type.name in names
        }
        known = {k: v for k, v in onnx_scan._SCHEMA[message].items() if v in names.values()}
        assert known == expected, proto
