"""The step graph: forward, loss, backward and optimizer as plain ONNX operators in one graph.

``(batch, θ, m, v, hyper) -> (loss, gradient norm, θ', m', v')``, so that any stock ONNX Runtime
trains. The training step below is ordinary torch; ``make_fx`` traces it together with its
gradient, and torch's exporter turns the trace into ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.func import functional_call, grad_and_value
from torch.fx.experimental.proxy_tensor import make_fx

from edge_ll.engine.step_graph import BETA1, BETA2, EPSILON, HYPER, OUTPUTS
from edge_ll.errors import ExportError
from edge_ll.manifest import OptimizerName, ThetaEntry
from edge_ll_export.graphs import export_program
from edge_ll_export.tail_loss import (
    BATCH_NAMES,
    TailLoss,
    example_batch,
    flatten_theta,
    join_theta,
    split_theta,
    theta_layout,
)

Step = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def training_step(tail: nn.Module, optimizer: OptimizerName) -> Step:
    """The step as a torch function of ``(*batch, theta, m, v, hyper)``.

    ``hyper`` is float32 [5]: learning rate, weight decay, clip norm, momentum and the number of
    this step, counted from 1.
    """
    module, layout = TailLoss(tail), theta_layout(tail)
    update = _adamw if optimizer == "adamw" else _sgd

    def step(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        batch, (theta, m, v, hyper) = tensors[: len(BATCH_NAMES)], tensors[len(BATCH_NAMES) :]

        def loss_of(parameters: dict[str, Tensor]) -> Tensor:
            named = {f"tail.{name}": value for name, value in parameters.items()}
            loss: Tensor = functional_call(module, named, batch)[0]
            return loss

        gradients, loss = grad_and_value(loss_of)(split_theta(theta, layout))
        gradient = join_theta(gradients, layout)
        norm = torch.sqrt((gradient * gradient).sum())
        gradient = gradient * (hyper[2] / torch.maximum(norm, hyper[2]))
        new_theta, new_m, new_v = update(theta, gradient, m, v, hyper)
        return loss, norm, new_theta, new_m, new_v

    return step


def _adamw(
    theta: Tensor, gradient: Tensor, m: Tensor, v: Tensor, hyper: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW with bias correction (Loshchilov and Hutter, ICLR 2019), as torch.optim.AdamW."""
    rate, decay, count = hyper[0], hyper[1], hyper[4]
    m = BETA1 * m + (1 - BETA1) * gradient
    v = BETA2 * v + (1 - BETA2) * gradient * gradient
    m_hat = m / (1 - torch.pow(torch.full_like(count, BETA1), count))
    v_hat = v / (1 - torch.pow(torch.full_like(count, BETA2), count))
    theta = theta * (1 - rate * decay) - rate * m_hat / (torch.sqrt(v_hat) + EPSILON)
    return theta, m, v


def _sgd(
    theta: Tensor, gradient: Tensor, m: Tensor, v: Tensor, hyper: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """SGD with momentum and weight decay, as torch.optim.SGD; ``v`` passes through."""
    rate, decay, momentum = hyper[0], hyper[1], hyper[3]
    m = momentum * m + gradient + decay * theta
    return theta - rate * m, m, v * 1.0


def export_step_graph(
    tail: nn.Module, latent_shape: tuple[int, ...], optimizer: OptimizerName
) -> bytes:
    """The step graph of a tail as ONNX bytes, with a dynamic batch axis.

    Raises:
        ExportError: An operator of the tail has no gradient or no ONNX form.
    """
    example = example_inputs(tail, latent_shape)
    try:
        traced = make_fx(
            training_step(tail, optimizer),
            tracing_mode="symbolic",
            decomposition_table=core_aten_decompositions(),  # type: ignore[arg-type]
        )(*example)
    except Exception as error:  # tracing raises whatever the tail's operators raise
        raise ExportError(f"{type(tail).__name__}: no gradient can be traced: {error}") from error
    names = (*BATCH_NAMES, "theta", "m", "v", HYPER)
    batch = torch.export.Dim("batch", min=1, max=65536)
    shapes: list[Any] = [{0: batch} for _ in BATCH_NAMES] + [None] * 4
    return export_program(traced, example, names, OUTPUTS, tuple(shapes))


def example_inputs(tail: nn.Module, latent_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Inputs of the step with the right shapes: a small batch, θ as it is, empty moments."""
    layout: tuple[ThetaEntry, ...] = theta_layout(tail)
    with torch.no_grad():
        classes = tail(torch.zeros((1, *latent_shape))).shape[1]
    n = example_batch(tail, (*latent_shape, classes))
    latents = torch.randn((n, *latent_shape), generator=torch.Generator().manual_seed(0))
    size = sum(entry.size for entry in layout)
    return (
        latents,
        torch.arange(n) % classes,
        torch.ones(n),
        torch.zeros(n, classes),
        torch.zeros(n, classes),
        torch.zeros(n),
        flatten_theta(tail),
        torch.zeros(size),
        torch.zeros(size),
        torch.tensor([1e-3, 0.0, 1.0, 0.9, 1.0]),
    )
