"""A tiny signed bundle with a linear tail, made without torch and without onnx.

Device tests run where neither is installed, so the three graphs are written by hand through a
minimal protobuf encoder. ``tests/contract/test_engine.py`` holds them against the numpy engine,
``tests/export/test_step_graph.py`` against torch's.
"""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from edge_ll.bundle import BACKBONE, PROJECTED_STEP, STEP, TAIL, THETA, Bundle, write_bundle
from edge_ll.engine.port import MASKED, Batch
from edge_ll.engine.step_graph import BETA1, BETA2, HYPER, OUTPUTS, REFERENCE
from edge_ll.manifest import (
    ArraySpec,
    DriftDefaults,
    LearnerDefaults,
    LossTerms,
    Manifest,
    Provenance,
    TensorSpec,
    ThetaEntry,
)
from edge_ll.novelty import fit_novelty
from edge_ll.quantize import LatentQuantizer
from edge_ll.trust import Signer, TrustStore

DEFAULT_TERMS = LossTerms()
SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
TRUST = TrustStore([SIGNER.public_key])

SHAPE, LATENT, CAPACITY, BASE = (2, 3), 6, 4, (0, 1)
LABELS = ("ash", "birch", "cedar", "dogwood", "elm", "fir")

LEARNER = LearnerDefaults(
    optimizer="adamw",
    learning_rate=0.03,
    weight_decay=0.01,
    clip_norm=5.0,
    batch_new=8,
    batch_replay=24,
    steps_per_batch=4,
    buffer_entries=60,
)

# Protobuf: field numbers are those of onnx.proto.

_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int16": 5, "int32": 6, "int64": 7}


def _varint(value: int) -> bytes:
    out, value = bytearray(), value & (2**64 - 1)
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: float | str | bytes) -> bytes:
    match value:
        case int():
            return _varint(number << 3) + _varint(value)
        case float():
            return _varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(_field(1, int(size)) for size in array.shape)
    return dims + _field(2, _TYPES[array.dtype.name]) + _field(8, name) + _field(9, array.tobytes())


def _value(name: str, dtype: str, shape: tuple[int | str, ...]) -> bytes:
    dims = [_field(1, _field(2 if isinstance(size, str) else 1, size)) for size in shape]
    tensor = _field(1, _TYPES[dtype]) + _field(2, b"".join(dims))
    return _field(1, name) + _field(2, _field(1, tensor))


def _attribute(name: str, value: float) -> bytes:
    kind, number = (2, 3) if isinstance(value, int) else (1, 2)
    return _field(1, name) + _field(number, value) + _field(20, kind)


class Graph:
    """A graph under construction: every operator gives the name of its one output."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names = 0

    def _name(self) -> str:
        self._names += 1
        return f"t{self._names}"

    def const(self, value: Any, dtype: str = "float32") -> str:
        name = self._name()
        self._parts.append(_field(5, _tensor(name, np.array(value, dtype))))
        return name

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: float) -> str:
        out = out or self._name()
        node = b"".join(_field(1, name) for name in inputs) + _field(2, out) + _field(4, kind)
        node += b"".join(_field(5, _attribute(*item)) for item in attributes.items())
        self._parts.append(_field(1, node))
        return out

    def model(self, inputs: dict[str, tuple], outputs: dict[str, tuple]) -> bytes:
        graph = b"".join(sorted(self._parts, key=lambda part: part[0] != 0x2A))
        graph += _field(2, "tiny")
        graph += b"".join(_field(11, _value(name, *spec)) for name, spec in inputs.items())
        graph += b"".join(_field(12, _value(name, *spec)) for name, spec in outputs.items())
        opset = _field(1, "") + _field(2, 18)
        return _field(1, 8) + _field(8, opset) + _field(7, graph)


def backbone_graph(gain: float = 1.0, dtype: str = "float32") -> bytes:
    """``x`` flattened, times ``gain``."""
    g = Graph()
    flat = g.op("Flatten", g.op("Cast", "x", to=1), axis=1)
    g.op("Mul", flat, g.const(gain), out="latents")
    return g.model({"x": (dtype, ("batch", *SHAPE))}, {"latents": ("float32", ("batch", LATENT))})


def _linear(g: Graph, capacity: int, out: str = "", latents: str = "latents") -> str:
    split, end = capacity * LATENT, capacity * (LATENT + 1)
    weight = g.op("Slice", "theta", g.const([0], "int64"), g.const([split], "int64"))
    weight = g.op("Reshape", weight, g.const([capacity, LATENT], "int64"))
    bias = g.op("Slice", "theta", g.const([split], "int64"), g.const([end], "int64"))
    return g.op("Gemm", latents, weight, bias, out=out, transB=1)


def tail_graph(capacity: int = CAPACITY, latents: str = "latents") -> bytes:
    """``(latents, theta) -> logits``; another name for the first input breaks the contract."""
    g = Graph()
    if latents != "latents":
        g.op("Identity", latents, out="latents")
    _linear(g, capacity, "logits")
    return g.model(
        {
            latents: ("float32", ("batch", LATENT)),
            "theta": ("float32", (capacity * (LATENT + 1),)),
        },
        {"logits": ("float32", ("batch", capacity))},
    )


def step_graph(
    optimizer: str = "adamw",
    capacity: int = CAPACITY,
    beta2: float = BETA2,
    terms: LossTerms = DEFAULT_TERMS,
    *,
    projected: bool = False,
) -> bytes:
    """Loss, gradient, clipping and update of a linear tail; see ``edge_ll.engine.step_graph``."""
    g = Graph()

    def hyper(index: int) -> str:
        return g.op("Gather", HYPER, g.const(index, "int64"), axis=0)

    loss, gradient = _loss_and_gradient(g, capacity, terms, "")
    if projected:
        _, against = _loss_and_gradient(g, capacity, terms, REFERENCE)
        slope = g.op("ReduceSum", g.op("Mul", gradient, against), keepdims=0)
        length = g.op("ReduceSum", g.op("Mul", against, against), keepdims=0)
        share = g.op("Div", g.op("Min", slope, g.const(0.0)), g.op("Max", length, g.const(1e-12)))
        gradient = g.op("Sub", gradient, g.op("Mul", share, against))
    if terms.anchor:
        away = g.op("Sub", "theta", "anchor_centre")
        pull = g.op("Mul", "anchor_weight", away)
        held = g.op("ReduceSum", g.op("Mul", pull, away), keepdims=0)
        loss = g.op("Add", loss, held)
        gradient = g.op("Add", gradient, g.op("Mul", g.const(2.0), pull))
    g.op("Identity", loss, out="loss")
    g.op("Sqrt", g.op("ReduceSum", g.op("Mul", gradient, gradient), keepdims=0), out="norm")
    clip = g.op("Div", hyper(2), g.op("Max", "norm", hyper(2)))
    gradient = g.op("Mul", gradient, clip)
    (_adamw if optimizer == "adamw" else _sgd)(g, gradient, hyper, beta2)

    vector = ("float32", (capacity * (LATENT + 1),))
    inputs = _batch_inputs(capacity, "", "batch")
    if projected:
        inputs |= _batch_inputs(capacity, REFERENCE, "reference")
    if terms.anchor:
        inputs |= {"anchor_centre": vector, "anchor_weight": vector}
    inputs |= {"theta": vector, "m": vector, "v": vector, HYPER: ("float32", (5,))}
    scalar: tuple = ("float32", ())
    return g.model(inputs, dict(zip(OUTPUTS, (scalar, scalar, *[vector] * 3), strict=True)))


def step_graphs(
    optimizer: str, capacity: int = CAPACITY, terms: LossTerms = DEFAULT_TERMS
) -> dict[str, bytes]:
    """The step graphs of a linear tail by their names in a bundle."""
    graphs = {STEP: step_graph(optimizer, capacity, terms=terms)}
    if terms.projection:
        graphs[PROJECTED_STEP] = step_graph(optimizer, capacity, terms=terms, projected=True)
    return graphs


def _batch_inputs(capacity: int, prefix: str, axis: str) -> dict[str, tuple]:
    return {
        f"{prefix}latents": ("float32", (axis, LATENT)),
        f"{prefix}labels": ("int64", (axis,)),
        f"{prefix}ce_weight": ("float32", (axis,)),
        f"{prefix}class_mask": ("float32", (axis, capacity)),
        f"{prefix}target_logits": ("float32", (axis, capacity)),
        f"{prefix}target_weight": ("float32", (axis,)),
    }


def _loss_and_gradient(g: Graph, capacity: int, terms: LossTerms, prefix: str) -> tuple[str, str]:
    """The loss of a batch but for the anchor, and its gradient."""
    rows, columns = g.const([0], "int64"), g.const([1], "int64")
    latents, labels, ce_weight, class_mask, target_logits, target_weight = _batch_inputs(
        capacity, prefix, ""
    )

    def column(vector: str) -> str:
        return g.op("Unsqueeze", vector, columns)

    logits = _linear(g, capacity, latents=latents)
    log_p = g.op("LogSoftmax", g.op("Add", logits, class_mask), axis=1)
    chosen = g.op("OneHot", labels, g.const(capacity, "int64"), g.const([0.0, 1.0]), axis=1)
    ce = g.op("Neg", g.op("ReduceSum", g.op("Mul", chosen, log_p), columns, keepdims=0))
    if terms.target == "kl":
        softness = g.const(terms.temperature)
        absent = g.op("Cast", g.op("Less", target_logits, g.const(MASKED / 2)), to=1)
        aligned = g.op("Add", logits, g.op("Mul", absent, g.const(MASKED)))
        wanted = g.op("LogSoftmax", g.op("Div", target_logits, softness), axis=1)
        got = g.op("LogSoftmax", g.op("Div", aligned, softness), axis=1)
        apart = g.op("Mul", g.op("Exp", wanted), g.op("Sub", wanted, got))
        distance = g.op("ReduceSum", apart, columns, keepdims=0)
        distance = g.op("Mul", distance, g.const(terms.temperature**2))
        pull = g.op("Mul", g.op("Sub", g.op("Exp", got), g.op("Exp", wanted)), softness)
    else:
        away = g.op("Sub", logits, target_logits)
        distance = g.op("ReduceMean", g.op("Mul", away, away), columns, keepdims=0)
        pull = g.op("Mul", away, g.const(2.0 / capacity))
    losses = g.op("Add", g.op("Mul", ce_weight, ce), g.op("Mul", target_weight, distance))
    loss = g.op("ReduceMean", losses, keepdims=0)

    slope = g.op("Mul", column(ce_weight), g.op("Sub", g.op("Exp", log_p), chosen))
    slope = g.op("Add", slope, g.op("Mul", pull, column(target_weight)))
    slope = g.op("Div", slope, g.op("Cast", g.op("Shape", labels), to=1))
    weight = g.op("MatMul", g.op("Transpose", slope), latents)
    weight = g.op("Reshape", weight, g.const([-1], "int64"))
    bias = g.op("ReduceSum", slope, rows, keepdims=0)
    return loss, g.op("Concat", weight, bias, axis=0)


def _adamw(g: Graph, gradient: str, hyper: Any, beta2: float) -> None:
    rate, keep, epsilon = hyper(0), hyper(1), hyper(4)

    def moment(old: str, new: str, beta: float, out: str) -> str:
        kept, added = g.op("Mul", old, g.const(beta)), g.op("Mul", new, g.const(1 - beta))
        return g.op("Add", kept, added, out=out)

    mean = moment("m", gradient, BETA1, "m_out")
    square = moment("v", g.op("Mul", gradient, gradient), beta2, "v_out")
    move = g.op("Div", mean, g.op("Add", g.op("Sqrt", square), epsilon))
    g.op("Sub", g.op("Mul", "theta", keep), g.op("Mul", rate, move), out="theta_out")


def _sgd(g: Graph, gradient: str, hyper: Any, _beta2: float) -> None:
    rate, decay, momentum = hyper(0), hyper(1), hyper(3)
    move = g.op("Add", g.op("Mul", momentum, "m"), gradient)
    g.op("Add", move, g.op("Mul", decay, "theta"), out="m_out")
    g.op("Sub", "theta", g.op("Mul", rate, "m_out"), out="theta_out")
    g.op("Identity", "v", out="v_out")


# The toy problem: class c lies around 2.5 on axis c.


def toy(
    classes: tuple[int, ...], n: int, *, seed: int = 0, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """``n`` inputs float32 [n, *SHAPE] of the classes in turn, shuffled, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.resize(np.array(classes, np.int64), n))
    points = rng.normal(shift, 0.6, (n, LATENT)) + 2.5 * np.eye(LATENT)[labels]
    return points.astype(np.float32).reshape(n, *SHAPE), labels


def write_stream(path: Path, *experiences: tuple[np.ndarray, np.ndarray]) -> Path:
    """A recorded stream of (inputs, labels) an experience."""
    numbers = [np.full(len(y), i, np.int64) for i, (_, y) in enumerate(experiences, 1)]
    np.savez(
        path,
        x=np.concatenate([x for x, _ in experiences]),
        label=np.concatenate([y for _, y in experiences]),
        experience=np.concatenate(numbers),
    )
    return path


def base_theta(capacity: int = CAPACITY) -> np.ndarray:
    """θ that separates the base classes and knows nothing of the others."""
    weight, bias = np.zeros((capacity, LATENT), np.float32), np.zeros(capacity, np.float32)
    for c in BASE:
        weight[c, c], bias[c] = 2.5, -2.5 * 2.5 / 2
    return np.concatenate([weight.reshape(-1), bias])


def theta_layout(capacity: int = CAPACITY) -> tuple[ThetaEntry, ...]:
    """As of an exported linear tail."""
    return (
        ThetaEntry(name="layers.0.weight", offset=0, shape=(capacity, LATENT)),
        ThetaEntry(name="layers.0.bias", offset=capacity * LATENT, shape=(capacity,)),
    )


def batch_of(latents: np.ndarray, labels: np.ndarray, *, capacity: int = CAPACITY) -> Batch:
    """Plain cross-entropy on all classes."""
    n = len(labels)
    return Batch(
        latents=latents.reshape(n, -1),
        labels=labels,
        ce_weight=np.ones(n, np.float32),
        class_mask=np.zeros((n, capacity), np.float32),
        target_logits=np.zeros((n, capacity), np.float32),
        target_weight=np.zeros(n, np.float32),
    )


def tiny_arrays(*, gain: float = 1.0) -> dict[str, np.ndarray]:
    """Anchors of all classes, exemplars of the base classes, quantizer and novelty reference."""

    def latents(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1) * np.float32(gain)

    x, y = toy(BASE, 200, seed=1)
    held, _ = toy(BASE, 400, seed=2)
    anchors, anchor_labels = toy(tuple(range(CAPACITY)), 120, seed=3)
    quantizer = LatentQuantizer.fit(latents(toy(tuple(range(CAPACITY)), 200, seed=4)[0]))
    novelty = fit_novelty(latents(x), y, latents(held))
    few = np.sort(np.concatenate([np.flatnonzero(y == c)[:20] for c in BASE]))
    return {
        "latent_scale": quantizer.scale,
        "latent_zero": quantizer.zero,
        "anchor_latents": quantizer.encode(latents(anchors)),
        "anchor_labels": anchor_labels,
        "exemplar_latents": quantizer.encode(latents(x[few])),
        "exemplar_labels": y[few],
        **{f"novelty_{name}": value for name, value in novelty._asdict().items()},
    }


# Tails exported with torch; each export takes seconds, so it is made once.


class TailCase(NamedTuple):
    """A small tail of one kind."""

    kind: str
    latent: tuple[int, ...]
    hidden: tuple[int, ...]


TAILS = {
    "linear": TailCase("linear", (LATENT,), ()),
    "mlp": TailCase("mlp", (LATENT,), (5,)),
    "pointwise": TailCase("pointwise", (6, 5), (6, 7)),
    "separable": TailCase("separable", (3, 10, 4), (5, 4)),
    "separable-1d": TailCase("separable", (3, 24), (5, 4)),
    "transformer": TailCase("transformer", (6, 5), (8, 12)),
}


def torch_tail(name: str) -> Any:
    """One of :data:`TAILS` with fixed weights."""
    import torch

    from edge_ll_export.models.tails import TAILS as KINDS

    torch.manual_seed(3)
    case = TAILS[name]
    return KINDS[case.kind](latent_shape=case.latent, hidden=case.hidden, capacity=CAPACITY)


@cache
def exported_tail(name: str) -> bytes:
    """The inference graph of :func:`torch_tail`."""
    from edge_ll_export.graphs import export_tail

    return export_tail(torch_tail(name), TAILS[name].latent)


@cache
def exported_steps(name: str, optimizer: str, terms: LossTerms = DEFAULT_TERMS) -> dict[str, bytes]:
    """The step graphs of :func:`torch_tail` by their names in a bundle."""
    from edge_ll_export.step_graph import export_step_graphs

    learner = replace(LEARNER, optimizer=optimizer, loss=terms)
    return export_step_graphs(torch_tail(name), TAILS[name].latent, learner)


def exported_step(name: str, optimizer: str) -> bytes:
    """The plain step graph of :func:`torch_tail`."""
    return exported_steps(name, optimizer)[STEP]


@cache
def exported_artifacts(name: str, learner: LearnerDefaults) -> dict[str, bytes]:
    """The artifacts for onnxruntime-training of :func:`torch_tail`."""
    from edge_ll_export.ort_artifacts import export_ort_artifacts

    return export_ort_artifacts(torch_tail(name), TAILS[name].latent, learner)


def write_torch_bundle(
    path: Path,
    kind: str,
    learner: LearnerDefaults = LEARNER,
    *,
    artifacts: bool = False,
    **changes: Any,
) -> Bundle:
    """A bundle with torch's graphs of a tail; its backbone is not of the tail's shape."""
    from edge_ll_export.tail_loss import flatten_theta, theta_layout

    tail = torch_tail(kind)
    steps = exported_steps(kind, learner.optimizer, learner.loss)
    files = {TAIL: exported_tail(kind), **steps}
    if artifacts:
        files |= exported_artifacts(kind, learner)
    engines = ("step-graph", "ort-training") if artifacts else ("step-graph",)
    fields: dict[str, Any] = {
        "theta": flatten_theta(tail).numpy(),
        "layout": theta_layout(tail),
        "latent": TensorSpec(shape=TAILS[kind].latent, dtype="float32"),
        "engines": engines,
        **changes,
        "files": files | changes.get("files", {}),
    }
    return write_tiny_bundle(path, learner=learner, **fields)


def write_tiny_bundle(
    path: Path,
    *,
    name: str = "toy",
    version: int = 1,
    gain: float = 1.0,
    capacity: int = CAPACITY,
    learner: LearnerDefaults = LEARNER,
    theta: np.ndarray | None = None,
    layout: tuple[ThetaEntry, ...] | None = None,
    arrays: dict[str, np.ndarray] | None = None,
    files: dict[str, bytes] | None = None,
    signer: Signer = SIGNER,
    **manifest: Any,
) -> Bundle:
    """Write a bundle and open it.

    Args:
        path: Where it goes.
        name: In the manifest.
        version: In the manifest.
        gain: Of the backbone: another gain is another backbone.
        capacity: Outputs of the tail.
        learner: How it learns; its optimizer decides the step graph.
        theta: Parameters of the tail.
        layout: Of θ, where the tail is not the linear one.
        arrays: Replace or add arrays.
        files: Replace or add files.
        signer: Signs it.
        manifest: Replaces further fields of the manifest.
    """
    held = {**tiny_arrays(gain=gain), **(arrays or {})}
    theta = base_theta(capacity) if theta is None else theta
    content = {
        BACKBONE: backbone_graph(gain),
        TAIL: tail_graph(capacity),
        **step_graphs(learner.optimizer, capacity, learner.loss),
        THETA: theta.astype("<f4").tobytes(),
        **{f"arrays/{key}": value.tobytes() for key, value in held.items()},
        **(files or {}),
    }
    fields: dict[str, Any] = {
        "name": name,
        "version": version,
        "input": TensorSpec(shape=SHAPE, dtype="float32"),
        "latent": TensorSpec(shape=(LATENT,), dtype="float32"),
        "labels": LABELS[:capacity],
        "base_classes": BASE,
        "known_classes": BASE,
        "theta": layout or theta_layout(capacity),
        "engines": ("step-graph",),
        "learner": learner,
        "drift": DriftDefaults(average_run_length=1e4, tolerance=0.05),
        "anchor_groups": {"base": BASE, "experience-1": (2,), "experience-2": (3,)},
        "arrays": {
            key: ArraySpec(file=f"arrays/{key}", dtype=value.dtype.name, shape=value.shape)
            for key, value in held.items()
        },
        "files": {},
        "provenance": Provenance(recipe="toy", created_at_s=0.0),
    }
    write_bundle(path, Manifest(**(fields | manifest)), content, signer)
    return Bundle.open(path, TrustStore([signer.public_key]))
