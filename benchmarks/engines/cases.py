"""What is measured: the tails, the batch sizes, and the engines with their environments.

Read by processes of every environment, so only the standard library is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

BATCHES = (1, 16, 64)

VARIANTS = 4
"""Different batches of each size, taken in turn: no engine may live on one that it has seen."""

Environment = Literal["server", "device", "device_ort", "onnxsim"]


@dataclass(frozen=True, kw_only=True)
class TailCase:
    """A tail with shapes that occur.

    Attributes:
        name: In the tables.
        kind: Class in :mod:`edge_ll_export.models.tails`.
        latent: Shape of one latent.
        capacity: Number of logits.
        options: The constructor's other arguments.
        what: Where such shapes come from.
    """

    name: str
    kind: str
    latent: tuple[int, ...]
    capacity: int
    options: dict[str, Any] = field(default_factory=dict)
    what: str

    def build(self) -> Any:
        """The torch module.

        Raises:
            AttributeError: There is no such tail.
        """
        from edge_ll_export.models import tails  # noqa: PLC0415

        kind = getattr(tails, self.kind)
        return kind(latent_shape=self.latent, capacity=self.capacity, **self.options)


_ROWS = (
    TailCase(
        name="linear",
        kind="MlpTail",
        latent=(256,),
        capacity=20,
        options={"hidden": ()},
        what="flat latent of a small network, as many classes as a home has",
    ),
    TailCase(
        name="linear_wide",
        kind="MlpTail",
        latent=(384,),
        capacity=150,
        options={"hidden": ()},
        what="sentence embedding (MiniLM) to the intents of CLINC150",
    ),
    TailCase(
        name="mlp",
        kind="MlpTail",
        latent=(256,),
        capacity=20,
        options={"hidden": (128,)},
        what="flat latent of a small network",
    ),
    TailCase(
        name="pointwise",
        kind="PointwiseTail",
        latent=(64, 125),
        capacity=12,
        options={"hidden": (64, 64)},
        what="64 channels over 125 steps of time, two 1x1 blocks",
    ),
    TailCase(
        name="dsconv",
        kind="SeparableTail",
        latent=(64, 25, 5),
        capacity=12,
        options={"hidden": (64,)},
        what="depthwise-separable block on the 25 x 5 map of DS-CNN (Hello Edge)",
    ),
    TailCase(
        name="transformer",
        kind="TransformerTail",
        latent=(384, 32),
        capacity=150,
        options={"hidden": (128, 256)},
        what="token states of MiniLM to the intents of CLINC150, block of width 128",
    ),
)

TAILS = {case.name: case for case in _ROWS}


@dataclass(frozen=True, kw_only=True)
class EngineCase:
    """An engine: which environment runs it, and what it does beside the common step.

    Attributes:
        name: In the tables and in the JSON.
        environment: Whose interpreter runs it.
        module: With its ``Runner``.
        whole: Whether a step does all of it: clipping and decoupled weight decay included.
    """

    name: str
    environment: Environment
    module: str
    whole: bool = True


_ENGINES = (
    EngineCase(name="torch_default", environment="server", module="on_torch"),
    EngineCase(name="torch_fused", environment="server", module="on_torch"),
    EngineCase(name="torch_compile", environment="server", module="on_torch"),
    EngineCase(name="step_graph", environment="device", module="on_edge_ll"),
    EngineCase(name="ort_training", environment="device_ort", module="on_edge_ll"),
    EngineCase(name="onnxsim", environment="onnxsim", module="on_onnxsim", whole=False),
)

ENGINES = {case.name: case for case in _ENGINES}
