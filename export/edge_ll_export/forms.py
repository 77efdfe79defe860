"""How operators are written in the step graph: the forms that ONNX Runtime's CPU runs fastest.

Torch's trace of a training step names each operator and gradient; torch's exporter has an ONNX
form for most. Here are those for which another form, measured, is faster or the only one. What
was tried, and what each gave, is in ``docs/research/step-graph.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule, Node

from edge_ll_export.depthwise import DepthwisePlan

aten = torch.ops.aten

Forms = Mapping[Callable[..., Any], Callable[..., Any]]

# Torch would decompose these into operators that cost more than the forms below.
_KEPT = (aten.threshold_backward, aten.linalg_vector_norm, aten.native_group_norm)

_STEEP = 3e38  # times any positive normal float32 this is past one
_BELOW = -1e-6  # puts zero below; OpenVINO takes an offset of exactly zero for the default, 0.5


def decompositions() -> Any:
    """Torch's table of decompositions into core operators, without those that have forms here."""
    table: Mapping[Any, Any] = dict(core_aten_decompositions())
    return {
        overload: function
        for overload, function in table.items()
        if getattr(overload, "overloadpacket", None) not in _KEPT
    }


def translations() -> Forms:
    """ONNX forms by torch operator, for torch's exporter."""
    return {
        aten.addmm.default: linear,
        aten.threshold_backward.default: relu_gradient,
        aten.linalg_vector_norm.default: norm,
        aten.native_group_norm.default: group_norm,
        aten.convolution.default: convolution,
        aten.convolution_backward.default: convolution_gradient,
    }


def relu_gradient(gradient: Any, output: Any, threshold: float) -> Any:
    """``gradient`` where ``output > 0``, as a product: ``Where`` takes several times as long."""
    if threshold:
        raise ValueError(f"only ReLU has a form, not a threshold of {threshold}")
    return op.Mul(gradient, op.HardSigmoid(output, alpha=_STEEP, beta=_BELOW))


def norm(x: Any, order: float = 2, axes: Any = None, *_: Any, **__: Any) -> Any:
    """The Euclidean norm of a whole tensor in one operator."""
    if order != 2 or axes is not None:
        raise ValueError(
            f"only the Euclidean norm of a whole tensor has a form, not order {order} over axes "
            f"{axes}; write it as the root of a sum of squares"
        )
    return op.ReduceL2(x, keepdims=0)


def linear(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """``x @ weight + bias``; a transposed weight is left as it lies, and read across."""
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose":
        return op.Gemm(x, producer.inputs[0], bias, alpha=alpha, beta=beta, transB=1)
    return op.Gemm(x, weight, bias, alpha=alpha, beta=beta)


def group_norm(
    x: Any,
    weight: Any,
    bias: Any,
    _samples: Any,
    _channels: Any,
    _size: Any,
    groups: int,
    eps: float,
) -> tuple[Any, Any, Any]:
    """Group norm without gain and bias: ``InstanceNormalization`` with a group for a channel."""
    if weight is not None or bias is not None:
        raise ValueError("only a group norm without gain and bias has a form")
    flat = op.Reshape(x, _ints(0, groups, -1))
    ones, zeros = (op.Constant(value_floats=[value] * groups) for value in (1.0, 0.0))
    normed = op.InstanceNormalization(flat, ones, zeros, epsilon=eps)
    result = op.Reshape(normed, _ints(0, *(int(size) for size in x.shape[1:])))
    return result, _unwanted(x), _unwanted(x)  # mean and deviation serve a gradient; nobody asks


def convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """Pointwise convolutions stay ``Conv``; depthwise ones become products with a banded matrix."""
    _only_plain(stride, dilation, output_padding, transposed=transposed)
    if groups == 1:
        inputs = (x, weight) if bias is None else (x, weight, bias)
        return op.Conv(*inputs, pads=[*padding, *padding])
    plan = DepthwisePlan.of(x.shape, weight.shape, padding, groups)
    result = plan.apply(plan.tiles(x), plan.matrix(weight))
    if bias is None:
        return result
    return op.Add(result, op.Reshape(bias, _ints(groups, *[1] * len(padding))))


def convolution_gradient(
    gradient: Any,
    x: Any,
    weight: Any,
    _bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Any, Any, Any]:
    """Gradients by input, weight and bias of what :func:`convolution` takes.

    A pointwise weight's gradient is a product per sample, summed; a depthwise one's is a product
    of tiles, from which the sums along the bands are taken.
    """
    _only_plain(stride, dilation, output_padding, transposed=transposed)
    by_input, by_weight, by_bias = (_unwanted(gradient) for _ in range(3))
    axes = list(range(2, 2 + len(padding)))
    if wanted[2]:
        by_bias = op.ReduceSum(gradient, _ints(0, *axes), keepdims=0)
    if groups == 1:
        outputs, inputs, *kernel = (int(size) for size in weight.shape)
        if set(kernel) != {1} or any(padding):
            raise ValueError(f"a convolution with kernel {kernel} in one group has no gradient")
        if wanted[0]:
            turned = op.Transpose(weight, perm=[1, 0, *axes])
            by_input = op.Conv(gradient, turned)
        if wanted[1]:
            flat = _ints(0, outputs, -1)
            samples = op.Transpose(op.Reshape(x, _ints(0, inputs, -1)), perm=[0, 2, 1])
            product = op.MatMul(op.Reshape(gradient, flat), samples)
            summed = op.ReduceSum(product, _ints(0), keepdims=0)
            by_weight = op.Reshape(summed, _ints(outputs, inputs, *kernel))
        return by_input, by_weight, by_bias
    plan = DepthwisePlan.of(x.shape, weight.shape, padding, groups)
    if wanted[0]:
        back = plan.backward()
        by_input = back.apply(back.tiles(gradient), back.matrix(weight))
    if wanted[1]:
        by_weight = plan.weight_gradient(plan.tiles(x), gradient)
    return by_input, by_weight, by_bias


def _unwanted(x: Any) -> Any:
    """A value in the place of an output that nobody reads; the exporter removes it."""
    return op.Identity(x)


def _only_plain(
    stride: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    *,
    transposed: bool,
) -> None:
    if set(stride) != {1} or set(dilation) != {1} or any(output_padding) or transposed:
        raise ValueError(
            f"convolutions in a tail have stride and dilation 1 and are not transposed; got stride "
            f"{list(stride)}, dilation {list(dilation)}"
        )


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


_ELEMENTWISE = {
    aten.add.Tensor,
    aten.div.Scalar,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.mul.Tensor,
    aten.neg.default,
    aten.sub.Tensor,
    aten.threshold_backward.default,
}


def late_broadcast(graph_module: GraphModule) -> GraphModule:
    """Let elementwise operators broadcast by themselves instead of reading an expanded copy.

    The gradient of a mean is one number for a whole row. Torch expands it first and divides the
    copies; here the division comes first, and an expansion whose readers broadcast is left out.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is aten.expand.default:
            _sink(node, node.args[0])
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _sink(expand: Node, source: Any) -> None:
    for user in list(expand.users):
        if user.target not in _ELEMENTWISE:
            continue
        values = [a.meta["val"] for a in user.args if isinstance(a, Node) and a is not expand]
        others = [value.shape for value in values if isinstance(value, Tensor)]
        if user.meta["val"].shape in others:
            user.replace_input_with(expand, source)
        elif all(len(shape) == 0 for shape in others):
            _swap(user, expand, source)


def _swap(user: Node, expand: Node, source: Any) -> None:
    """``f(expand(x))`` becomes ``expand(f(x))`` for an ``f`` whose other inputs are scalars."""
    graph = user.graph
    arguments = tuple(source if a is expand else a for a in user.args)
    function: Any = user.target
    with graph.inserting_before(user):
        inner = graph.call_function(function, arguments, user.kwargs)
        inner.meta["val"] = source.meta["val"]
        outer = graph.call_function(aten.expand.default, (inner, *expand.args[1:]))
        outer.meta["val"] = user.meta["val"]
    user.replace_all_uses_with(outer)
    graph.erase_node(user)
    _sink(outer, inner)
