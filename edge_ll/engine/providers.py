"""Execution providers: their names here and in ONNX Runtime, and what each is told.

A provider belongs into the table once its tests in ``tests/contract/test_providers.py`` pass. For
``cuda`` they are written and wait for a machine with a GPU: take it for experimental.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from edge_ll.errors import EngineError


class Provider(NamedTuple):
    """One execution provider.

    Attributes:
        ort_name: ONNX Runtime's name for it.
        options: Its options in ONNX Runtime's words, for a number of threads.
        extra: Of this distribution: what brings it.
        needs: What the machine must have to load it, for people.
    """

    ort_name: str
    options: Callable[[int], dict[str, str]]
    extra: str
    needs: str


def _openvino(threads: int) -> dict[str, str]:
    # OpenVINO may take bfloat16 where a processor has it: told to, latents of the DS-CNN student
    # differ from the CPU's by 3e-2, in float32 by 3e-6.
    return {
        "device_type": "CPU",
        "precision": "FP32",
        "num_of_threads": str(threads),
        "num_streams": "1",
    }


PROVIDERS: Mapping[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", lambda _: {}, "device", "nothing else"),
    # TF32 rounds the factors of a product to ten bits, which gradients do not forgive.
    "cuda": Provider(
        "CUDAExecutionProvider",
        lambda _: {"use_tf32": "0"},
        "device-cuda",
        "an NVIDIA GPU with its driver, CUDA and cuDNN",
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider", _openvino, "device-openvino", "an x86-64 processor"
    ),
}
"""By the name that configurations use."""


def check_names(wanted: tuple[str, ...]) -> None:
    """Refuse a list that is empty or holds a name that is not in the table.

    Raises:
        EngineError: What was expected and what came.
    """
    if not wanted or not set(wanted) <= set(PROVIDERS):
        known = ", ".join(PROVIDERS)
        raise EngineError(f"providers: expected some of {known}; got {', '.join(wanted) or 'none'}")


def require_cpu(wanted: tuple[str, ...], engine: str) -> None:
    """Refuse a list without the CPU for an engine that trains nowhere else.

    Raises:
        EngineError: What to write instead.
    """
    check_names(wanted)
    if "cpu" not in wanted:
        raise EngineError(
            f"the engine {engine} trains on the CPU only; providers: got {', '.join(wanted)}; "
            'add "cpu" to the list, or use the engine step-graph'
        )


def kleidiai_hoards(system: str, machine: str, features: frozenset[str]) -> bool:
    """Whether ONNX Runtime's KleidiAI kernels would run here, and keep memory without need.

    On processors with SME these kernels cache packed operands: up to 1.26 one for each input that
    a convolution ever saw, later versions one for each shape. On other processors they serve
    int4 weights only, which no graph here has.

    Args:
        system: As of ``platform.system()``.
        machine: As of ``platform.machine()``.
        features: Of the processor, as Linux lists them; elsewhere they are unknown and taken to
            include SME.
    """
    if machine.lower() not in {"aarch64", "arm64"}:
        return False
    return system != "Linux" or any(feature.startswith("sme") for feature in features)
