"""A tail's forward pass and loss as the peer wants it: fixed shapes, opset 17, few operators.

onnxsim differentiates ONNX graphs with one rule an operator, and refuses a graph that holds an
operator without one, so the loss is written anew with those that have: no log-softmax, and labels
as one-hot rows. It is the same function: :mod:`benchmarks.engines.coordinator` compares the losses.
"""

from __future__ import annotations

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.func import functional_call

from edge_ll.errors import ExportError
from edge_ll_export.graphs import export_program

INPUTS = ("latents", "chosen", "ce_weight", "class_mask", "target_logits", "target_weight")
_OPSET = 17


class _LossOfParameters(nn.Module):
    """The parameters are inputs, so that the exporter's optimizer cannot fold them away."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self._tail = [tail]
        self._names = [name for name, _ in tail.named_parameters()]

    def forward(self, *tensors: Tensor) -> Tensor:
        """The mean loss of :func:`edge_ll_export.tail_loss.batch_loss`, a scalar."""
        latents, chosen, ce_weight, class_mask, target_logits, target_weight = tensors[:6]
        parameters = dict(zip(self._names, tensors[6:], strict=True))
        logits: Tensor = functional_call(self._tail[0], parameters, (latents,))
        masked = logits + class_mask
        # Logits of a fresh tail are small: no maximum needs to be taken out before exp.
        cross_entropy = torch.log(torch.exp(masked).sum(dim=1)) - (chosen * masked).sum(dim=1)
        difference = logits - target_logits
        distance = (difference * difference).mean(dim=1)
        return (ce_weight * cross_entropy + target_weight * distance).mean()


def export_peer(tail: nn.Module, latent: tuple[int, ...], capacity: int, n: int) -> bytes:
    """The graph for batches of ``n``; parameters are initializers called ``tail.*``.

    Raises:
        ExportError: torch cannot express the tail in ONNX.
    """
    parameters = {f"tail.{name}": p.detach() for name, p in tail.named_parameters()}
    example = (
        torch.zeros(n, *latent),
        torch.zeros(n, capacity),
        torch.zeros(n),
        torch.zeros(n, capacity),
        torch.zeros(n, capacity),
        torch.zeros(n),
        *parameters.values(),
    )
    data = export_program(
        _LossOfParameters(tail),
        example,
        (*INPUTS, *parameters),
        ("loss",),
        ((None,) * len(example),),
    )
    model = onnx.load_from_string(data)
    graph = model.graph
    kept = [value for value in graph.input if value.name not in parameters]
    del graph.input[:]
    graph.input.extend(kept)
    graph.initializer.extend(
        numpy_helper.from_array(p.numpy(), name) for name, p in parameters.items()
    )
    _to_opset_17(model)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the peer's graph is not valid: {error}") from error
    made: bytes = model.SerializeToString()
    return made


def _to_opset_17(model: onnx.ModelProto) -> None:
    """The axes of a mean are an attribute there; constants become initializers by the way."""
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)
    values = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "ReduceMean":
            continue
        axes = [numpy_helper.to_array(values[name]).tolist() for name in node.input[1:]]
        kept = [a for a in node.attribute if a.name == "keepdims"]
        del node.input[1:]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(onnx.helper.make_attribute("axes", list(a)) for a in axes)
    model.opset_import[0].version = _OPSET
