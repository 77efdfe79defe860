"""The agent's configuration: one TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from edge_ll.config import Section

Name = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
Count = Annotated[int, Meta(ge=1)]
Provider = Literal["cpu", "cuda", "openvino"]


class BrokerConfig(Section, frozen=True, kw_only=True):
    """The fleet's broker."""

    url: Annotated[str, Meta(description="mqtt://[user:password@]host[:port], mqtts:// for TLS")]
    keepalive_s: Count = 30


class RuntimeConfig(Section, frozen=True, kw_only=True):
    """How the student runs; see :class:`edge_ll.engine.runtime.RuntimeOptions`."""

    engine: Literal["auto", "step-graph", "ort-training"] = "auto"
    providers: Annotated[tuple[Provider, ...], Meta(min_length=1)] = ("cpu",)
    threads: Count = 1
    spinning: bool = False
    arena: Annotated[bool, Meta(description="all graphs share one pool of memory")] = True
    arena_limit_bytes: Annotated[int, Meta(ge=0, description="limit of the pool; 0: none")] = 0


class LearningConfig(Section, frozen=True, kw_only=True):
    """How the student learns here; what is left out is as the bundle says."""

    replay: Annotated[bool, Meta(description="false: learn without replay, and forget")] = True
    buffer_entries: Annotated[int, Meta(ge=1)] | None = None
    seed: Annotated[int, Meta(ge=0)] = 0


class StreamConfig(Section, frozen=True, kw_only=True):
    """Local samples from a file; see :mod:`edge_ll_device.source`."""

    file: str
    interval_s: Annotated[float, Meta(ge=0, description="pause between batches")] = 0.0


class AgentConfig(Section, frozen=True, kw_only=True):
    """Everything the agent is told."""

    device: Name
    tenant: Name = "default"
    state_dir: Annotated[str, Meta(description="where bundles, learned state and reports are kept")]
    trusted_keys: Annotated[
        tuple[str, ...], Meta(min_length=1, description="public keys in hexadecimal, as in *.pub")
    ]
    broker: BrokerConfig
    runtime: RuntimeConfig = RuntimeConfig()
    learning: LearningConfig = LearningConfig()
    stream: StreamConfig | None = None
    report_every_samples: Count = 20

    @property
    def state_path(self) -> Path:
        """``state_dir`` as a path."""
        return Path(self.state_dir).expanduser()
