"""Every error edge_ll raises on purpose.

An error says what went wrong, what was expected, what came, and what to do next.
Foreign exceptions are turned into one of these at the port where they appear.
"""

from __future__ import annotations

from collections.abc import Sequence


class EdgeLLError(Exception):
    """Base of all errors that a caller may want to handle."""


class ConfigError(EdgeLLError):
    """A recipe or configuration is wrong; ``problems`` lists every fault found, one line each."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(f"{source}: {count} problem{'s'[: count != 1]}\n{lines}")


class BundleError(EdgeLLError):
    """A bundle is damaged, incomplete, of an unknown format, or holds what it must not."""


class TrustError(EdgeLLError):
    """A signature is missing, wrong, or made by a key that is not trusted."""


class EngineError(EdgeLLError):
    """An engine cannot be built here, or a computation was refused or failed."""


class SampleError(EdgeLLError):
    """A sample has the wrong shape, dtype, value or label; it was not learned from."""


class TransportError(EdgeLLError):
    """The broker could not be reached or refused what was asked."""


class ProtocolError(EdgeLLError):
    """A received message is malformed, oversized, or not what its topic promises."""


class DataError(EdgeLLError):
    """A data set is missing, damaged, or not in the project's form."""


class RegistryError(EdgeLLError):
    """The fleet's registry cannot be opened, is of an unknown schema, or refused a statement."""


class ExportError(EdgeLLError):
    """The export failed or its result disagrees with torch."""


class MissingExtraError(EdgeLLError):
    """A feature needs an optional dependency; the message names the pip command."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f'{feature} needs the extra "{extra}", which is not installed; '
            f'run: pip install "edge-ll[{extra}]"'
        )
