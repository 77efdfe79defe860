"""Ask for an optional dependency before a verb needs it."""

from __future__ import annotations

from importlib.util import find_spec

from edge_ll.errors import MissingExtraError

_MODULES = {
    "export": ("torch", "onnx", "onnxscript", "sklearn"),
    "fleet": ("sqlalchemy", "rich", "matplotlib", "amqtt"),
}


def need(extra: str, feature: str) -> None:
    """Raise unless the extra is installed.

    Raises:
        MissingExtraError: Names the pip command.
    """
    if any(find_spec(module) is None for module in _MODULES[extra]):
        raise MissingExtraError(feature, extra)
