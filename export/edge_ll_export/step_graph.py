"""The step graph: forward, loss, backward and optimizer as plain ONNX operators in one graph.

``(batch, θ, m, v, hyper) -> (loss, gradient norm, θ', m', v')``, so that any stock ONNX Runtime
trains. The training step below is ordinary torch; ``make_fx`` traces it together with its
gradient, and torch's exporter turns the trace into ONNX, with the forms of :mod:`.forms` where
they are faster.

The projected step takes a second batch: ``(batch, reference batch, θ, m, v, hyper)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from edge_ll.bundle import PROJECTED_STEP, STEP
from edge_ll.engine.step_graph import BETA1, BETA2, HYPER, OUTPUTS, REFERENCE
from edge_ll.errors import ExportError
from edge_ll.manifest import LearnerDefaults, LossTerms, OptimizerName
from edge_ll_export.diagnose import failing_layer, operator_of, root_cause
from edge_ll_export.forms import decompositions, late_broadcast, translations
from edge_ll_export.graphs import export_program
from edge_ll_export.tail_loss import (
    ANCHOR_NAMES,
    BATCH_NAMES,
    anchor_loss,
    anchor_slope,
    batch_loss,
    batch_loss_slope,
    example_batch,
    flatten_theta,
    join_theta,
    split_theta,
    theta_layout,
)

Step = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

REFERENCE_NAMES = tuple(f"{REFERENCE}{name}" for name in BATCH_NAMES)


def step_inputs(terms: LossTerms, *, projected: bool = False) -> tuple[str, ...]:
    """Names of the step's inputs, in order."""
    reference = REFERENCE_NAMES if projected else ()
    anchor = ANCHOR_NAMES if terms.anchor else ()
    return (*BATCH_NAMES, *reference, *anchor, "theta", "m", "v", HYPER)


def training_step(
    tail: nn.Module, optimizer: OptimizerName, terms: LossTerms, *, projected: bool = False
) -> Step:
    """The step as a torch function of the tensors that :func:`step_inputs` names.

    ``hyper`` is float32 [5], made by :func:`edge_ll.engine.step_graph.hyper_parameters`.
    """
    names = step_inputs(terms, projected=projected)
    update: Update = _adamw if optimizer == "adamw" else _sgd

    def step(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        given = dict(zip(names, tensors, strict=True))
        theta, hyper = given["theta"], given[HYPER]
        loss, gradient = _gradient(tail, theta, [given[name] for name in BATCH_NAMES], terms)
        if projected:
            reference = [given[name] for name in REFERENCE_NAMES]
            gradient = _project(gradient, _gradient(tail, theta, reference, terms)[1])
        if terms.anchor:
            anchor = [given[name] for name in ANCHOR_NAMES]
            loss = loss + anchor_loss(theta, *anchor)
            gradient = gradient + anchor_slope(theta, *anchor)
        norm = torch.linalg.vector_norm(gradient)
        most = torch.split(hyper, 1)[2]
        clip = most / torch.maximum(norm, most)
        return loss, norm, *update(theta, gradient, clip, given["m"], given["v"], hyper)

    return step


def _gradient(
    tail: nn.Module, theta: Tensor, batch: list[Tensor], terms: LossTerms
) -> tuple[Tensor, Tensor]:
    """The batch's loss, and its gradient float32 [P]."""
    layout = theta_layout(tail)
    latents, *rest = batch

    def logits_of(parameters: dict[str, Tensor]) -> Tensor:
        logits: Tensor = functional_call(tail, parameters, (latents,))
        return logits

    logits, pull_back = vjp(logits_of, split_theta(theta, layout))  # type: ignore[misc]
    (gradients,) = pull_back(batch_loss_slope(logits, *rest, terms=terms))
    return batch_loss(logits, *rest, terms=terms), join_theta(gradients, layout)


def _project(gradient: Tensor, reference: Tensor) -> Tensor:
    """A-GEM: without the part that would raise the reference batch's loss.

    ``g - min(g·r, 0) / (r·r) r``; Chaudhry et al., ICLR 2019, equation 11.
    """
    against = torch.clamp_max((gradient * reference).sum(), 0.0)
    length = torch.clamp_min((reference * reference).sum(), 1e-12)
    return gradient - against / length * reference


def _adamw(
    theta: Tensor, gradient: Tensor, clip: Tensor, m: Tensor, v: Tensor, hyper: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW (Loshchilov and Hutter, ICLR 2019), as torch.optim.AdamW.

    Bias correction and decay are folded into the numbers of ``hyper``, so that each pass over the
    P parameters is one that has to be made.
    """
    rate, keep, _, _, epsilon = torch.split(hyper, 1)
    m = BETA1 * m + gradient * (clip * (1 - BETA1))
    scaled = gradient * (clip * (1 - BETA2) ** 0.5)
    v = BETA2 * v + scaled * scaled
    return theta * keep - rate * m / (torch.sqrt(v) + epsilon), m, v


def _sgd(
    theta: Tensor, gradient: Tensor, clip: Tensor, m: Tensor, v: Tensor, hyper: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """SGD with momentum and weight decay, as torch.optim.SGD; ``v`` passes through."""
    rate, decay, _, momentum, _ = torch.split(hyper, 1)
    m = momentum * m + clip * gradient + decay * theta
    return theta - rate * m, m, v * 1.0


def export_step_graphs(
    tail: nn.Module, latent_shape: tuple[int, ...], learner: LearnerDefaults
) -> dict[str, bytes]:
    """The graphs that the learner needs, by their names in a bundle.

    Raises:
        ExportError: An operator of the tail has no gradient or no ONNX form.
    """
    variants = {STEP: False} | ({PROJECTED_STEP: True} if learner.loss.projection else {})
    return {
        name: export_step_graph(
            tail, latent_shape, learner.optimizer, learner.loss, projected=projected
        )
        for name, projected in variants.items()
    }


def export_step_graph(
    tail: nn.Module,
    latent_shape: tuple[int, ...],
    optimizer: OptimizerName,
    terms: LossTerms,
    *,
    projected: bool = False,
) -> bytes:
    """The step graph of a tail as ONNX bytes, with a dynamic batch axis.

    Raises:
        ExportError: An operator of the tail has no gradient or no ONNX form.
    """
    try:
        return _export(tail, latent_shape, optimizer, terms, projected=projected)
    except ExportError as error:
        layer = failing_layer(
            tail,
            latent_shape,
            lambda alone, x: _check_exportable(alone, tuple(x.shape[1:])),
        )
        where = ", ".join(filter(None, (type(tail).__name__, layer, operator_of(error))))
        raise ExportError(
            f"{where}: it cannot be trained on a device: {root_cause(error)}. See the tails in "
            "edge_ll_export.models.tails for layers that can"
        ) from error


def _check_exportable(tail: nn.Module, latent_shape: tuple[int, ...]) -> None:
    _export(tail, latent_shape, "sgd", LossTerms(), projected=False)


def _export(
    tail: nn.Module,
    latent_shape: tuple[int, ...],
    optimizer: OptimizerName,
    terms: LossTerms,
    *,
    projected: bool,
) -> bytes:
    names = step_inputs(terms, projected=projected)
    example = example_inputs(tail, latent_shape, names)
    traced = _trace(training_step(tail, optimizer, terms, projected=projected), example)
    batch, reference = (torch.export.Dim(name, min=1, max=65536) for name in ("batch", "reference"))
    shapes: list[Any] = [
        {0: batch} if name in BATCH_NAMES else {0: reference} if name in REFERENCE_NAMES else None
        for name in names
    ]
    data = export_program(traced, example, names, OUTPUTS, tuple(shapes), forms=translations())
    _check_batch_axis(data)
    return data


def _trace(step: Step, example: tuple[Tensor, ...]) -> GraphModule:
    try:
        traced = make_fx(
            step,
            tracing_mode="symbolic",
            decomposition_table=decompositions(),
        )(*example)
    except Exception as error:  # tracing raises whatever the tail's operators raise
        raise ExportError(f"no gradient can be traced: {error}") from error
    return late_broadcast(traced)


def _check_batch_axis(data: bytes) -> None:
    """Tracing may take the example's batch size for the only one, without a word."""
    for value in onnx.load_from_string(data).graph.input:
        axes = value.type.tensor_type.shape.dim
        if value.name in (*BATCH_NAMES, *REFERENCE_NAMES) and not axes[0].dim_param:
            raise ExportError(
                f"the graph takes batches of {axes[0].dim_value} only, expected any size: an "
                "operator fixes the batch axis, as a linear layer on an input of three axes does "
                "(flatten it to two)"
            )


def example_inputs(
    tail: nn.Module, latent_shape: tuple[int, ...], names: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """Inputs of the right shapes by name: small batches, θ as it is, empty moments."""
    with torch.no_grad():
        classes = tail(torch.zeros((1, *latent_shape))).shape[1]
    theta = flatten_theta(tail)
    n = example_batch(tail, (*latent_shape, classes, len(theta)))
    further = example_batch(tail, (*latent_shape, classes, len(theta), n))
    vectors = {
        "theta": theta,
        HYPER: torch.tensor([1e-3, 1.0, 1.0, 0.9, 1e-6]),
        **{name: torch.zeros(len(theta)) for name in ("m", "v", *ANCHOR_NAMES)},
    }
    batch = _example_tensors(n, latent_shape, classes)
    reference = _example_tensors(further, latent_shape, classes)
    known = {
        **vectors,
        **dict(zip(BATCH_NAMES, batch, strict=True)),
        **dict(zip(REFERENCE_NAMES, reference, strict=True)),
    }
    return tuple(known[name] for name in names)


def _example_tensors(n: int, latent_shape: tuple[int, ...], classes: int) -> tuple[Tensor, ...]:
    return (
        torch.randn((n, *latent_shape), generator=torch.Generator().manual_seed(0)),
        torch.arange(n) % classes,
        torch.ones(n),
        torch.zeros(n, classes),
        torch.zeros(n, classes),
        torch.zeros(n),
    )
