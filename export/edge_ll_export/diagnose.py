"""Which layer and which operator an export failed on, in words.

torch's tracer and exporter see one flat list of operators; a person thinks in layers. So when a
tail cannot be exported, each of its layers is tried alone, on the input that it gets in the tail.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

_OPERATOR = re.compile(r"torch\.ops\.(\w+\.\w+)|(aten::\w+)")
_NOISE = re.compile(r"\x1b\[\d+m")


def operator_of(error: BaseException) -> str:
    """The torch operator that an exception, or one behind it, speaks of; empty if none does."""
    found = [match for e in _chain(error) if (match := _OPERATOR.search(str(e)))]
    return (found[-1].group(1) or found[-1].group(2)).replace("::", ".") if found else ""


def root_cause(error: BaseException) -> str:
    """The first line of the innermost exception."""
    lines = _NOISE.sub("", str(_chain(error)[-1])).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def failing_layer(
    tail: nn.Module, latent_shape: tuple[int, ...], export: Callable[[nn.Module, Tensor], None]
) -> str:
    """The first layer that ``export`` fails on alone, as "layer name (Type)"; empty if none does.

    Args:
        tail: What could not be exported.
        latent_shape: Of its input, without the batch axis.
        export: Exports a module for an example of its input.
    """
    for name, layer, x in _inputs(tail, latent_shape):
        try:
            export(_Alone(layer), x)
        except Exception:  # noqa: BLE001 - whatever it is, this is the layer
            return f"layer {name} ({type(layer).__name__})"
    return ""


class _Alone(nn.Module):
    """One layer as a tail: its output are the logits, and a gain gives its input a gradient."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.layer = layer

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.layer(z * self.gain).flatten(1)
        return logits


def _inputs(tail: nn.Module, latent_shape: tuple[int, ...]) -> list[tuple[str, nn.Module, Tensor]]:
    """Every layer without parts of its own, with what it gets when the tail runs."""
    seen: list[tuple[str, nn.Module, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, given, name=name: seen.append((name, layer, given[0].detach()))
        )
        for name, layer in tail.named_modules()
        if not list(layer.children())
    ]
    try:
        with torch.no_grad():
            tail(torch.randn((2, *latent_shape), generator=torch.Generator().manual_seed(0)))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    return chain
