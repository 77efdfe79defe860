"""Look into an ONNX file's bytes before any runtime parses it.

A model can name files outside itself (external data), which runtimes then open relative to the
working directory: path traversal (CVE-2025-51480, GHSA-whh8-fjgc-qp73). The device has no ``onnx``
package, so this walks the protobuf wire format directly, without building objects.
Field numbers are those of ``onnx.proto`` (ONNX IR specification).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from edge_ll.errors import BundleError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 32

# message -> field number -> the message inside; "text" and "external" are acted upon.
_SCHEMA: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function", 20: "training"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute", 7: "domain"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external", 14: "location"},
}


def check_onnx(name: str, data: bytes, *, domains: Collection[str] = ("", "ai.onnx")) -> None:
    """Refuse external data, operators outside ``domains``, and bytes that are not protobuf.

    Args:
        name: The file's name, for the error.
        data: The whole ONNX file.
        domains: Operator domains allowed in it.

    Raises:
        BundleError: What was found and why it is refused.
    """
    if data[4:8] == b"ORTM":  # ONNX Runtime reads such bytes as its own format
        raise BundleError(f"{name}: is in the ORT format; expected ONNX")
    view = memoryview(data)
    has_graph = False
    for number, wire, _, _ in _fields(name, view):
        has_graph |= number == 7 and wire == _BYTES
    if not has_graph:
        raise BundleError(f"{name}: expected an ONNX model, found no graph in it")
    _walk(name, view, "model", frozenset(domains), 0)


def _walk(name: str, view: memoryview, message: str, domains: frozenset[str], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise BundleError(f"{name}: graphs nested deeper than {_MAX_DEPTH}; refused")
    inside = _SCHEMA[message]
    for number, wire, value, chunk in _fields(name, view):
        kind = inside.get(number)
        if kind is None:
            continue
        if kind == "external" or (kind == "location" and wire == _VARINT and value != 0):
            raise BundleError(f"{name}: holds external data; a bundle's graphs are self-contained")
        if kind == "domain":
            domain = bytes(chunk).decode("utf-8", "replace")
            if domain not in domains:
                allowed = ", ".join(sorted(item or "ai.onnx" for item in domains))
                raise BundleError(f"{name}: operator domain {domain!r} is not allowed ({allowed})")
        elif kind in _SCHEMA and wire == _BYTES:
            _walk(name, chunk, kind, domains, depth + 1)


def _fields(name: str, view: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """Each field as (number, wire type, integer value, bytes value)."""
    at, end = 0, len(view)
    empty = view[:0]
    while at < end:
        key, at = _varint(name, view, at)
        number, wire = key >> 3, key & 7
        if not 1 <= number < 1 << 29:  # parsers drop the bits past the 32nd and see another field
            raise BundleError(f"{name}: is not an ONNX file (field number {number})")
        value, chunk = 0, empty
        if wire == _VARINT:
            value, at = _varint(name, view, at)
        elif wire == _BYTES:
            size, at = _varint(name, view, at)
            chunk = view[at : at + size]
            at += size
        elif wire == _FIXED64:
            at += 8
        elif wire == _FIXED32:
            at += 4
        else:
            raise BundleError(f"{name}: is not an ONNX file (wire type {wire})")
        if at > end:
            raise BundleError(f"{name}: is truncated")
        yield number, wire, value, chunk


def _varint(name: str, view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise BundleError(f"{name}: is truncated")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise BundleError(f"{name}: is not an ONNX file (endless varint)")
