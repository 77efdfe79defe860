"""What both commands share: options for logging, and how a verb ends."""

from __future__ import annotations

import argparse
import os
import sys

from edge_ll import __version__, logs
from edge_ll.errors import EdgeLLError

OK, CHECK_FAILED, FAILED = 0, 1, 2


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add ``--version`` and the options for logging."""
    parser.add_argument("--version", action="version", version=f"edge-ll {__version__}")
    parser.add_argument("--log-level", choices=logs.LEVELS, default="info")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")


def run_verb(arguments: argparse.Namespace) -> int:
    """Run ``arguments.run``.

    Returns:
        Its exit code: 0 when it worked, 1 when a check that was asked for failed; 2 when it could
        not be done, with the reason on standard error.
    """
    logs.configure(level=arguments.log_level, style=arguments.log_format)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has enough; leave without a fuss at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except EdgeLLError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  (the command's answer)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return FAILED
    return code
